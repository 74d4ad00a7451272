"""What the guard over the retain data measures: which samples, in which mode, without a trace, and what is said."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, Holdout, RetainGuard
from hamu_lightning.callbacks import StopReason
from hamu_lightning.callbacks.goals._excerpts import choose_place, choose_positions, count_batches
from hamu_lightning.objectives import CrossEntropy
from hamu_lightning.rules import FixedRadius, TargetQuota
from tests.callbacks.modules import MODULES, Base, WithBatchNorm, WithDropout, build, fit, make_data

pytestmark = pytest.mark.filterwarnings(
    "ignore:The base optimizer", "ignore:The fit has ended before the target", "ignore:.*share .* samples of one Data"
)
FORGET, RETAIN, HELD_OUT = make_data(40, seed=9), make_data(96), make_data(30, seed=4)
GENTLE = HAMUQ(1e-3, radius=FixedRadius(1e-3))
GUARD = RetainGuard(every=2)
TOWARDS = HAMUQ(TargetQuota(Holdout(HELD_OUT)), radius=FixedRadius(1e-3))


def run(
    kind: type[Base] = Base, guard: Any = GUARD, rule: Any = GENTLE, **options: Any
) -> tuple[Base, HAMUCallback, Any, Any]:
    module = build(kind)
    settings = {name: options.pop(name) for name in ("retain_objective",) if name in options}
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=20, shuffle=True), rule, guard=guard, **settings)
    trainer, recorder = fit(module, hamu, **{"max_epochs": 1, **options})
    return module, hamu, trainer, recorder


def readings(hamu: HAMUCallback, name: str = "start") -> dict[str, list[float]]:
    found: dict[str, list[float]] = hamu.state_dict()["guard"][name]
    return found


@torch.no_grad()
def measure(module: nn.Module, data: TensorDataset) -> tuple[float, float]:
    x, y = data.tensors
    module.eval()
    logits = module(x)
    module.train()
    return float(nn.functional.cross_entropy(logits, y)), float((logits.argmax(1) == y).double().mean())


@pytest.mark.parametrize("kind", MODULES)
def test_it_leaves_no_trace(kind: type[Base]) -> None:
    (plain, _, _, values), (module, _, _, others) = run(kind, guard=False), run(kind)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), module.buffers(), strict=True))
    assert values.values == others.values


class ByForward(WithDropout):
    """Its loss is that of its forward pass."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("kind", [Base, WithBatchNorm, ByForward])
def test_it_measures_in_evaluation_mode(kind: type[Base]) -> None:
    expected = measure(build(kind), RETAIN)
    module, hamu, trainer, _ = run(kind, log_every_n_steps=1)
    loss, accuracy, samples = readings(hamu)["retain"]
    assert (loss, accuracy, samples) == (pytest.approx(expected[0]), pytest.approx(expected[1]), 96)
    if kind is not WithBatchNorm:  # whose retain batches move its statistics on
        assert readings(hamu, "now")["retain"][:2] == pytest.approx(measure(module, RETAIN))
    logged = trainer.callback_metrics
    assert {"hamu/retain_level", "hamu/retain_accuracy"} <= set(logged) and "hamu/holdout_level" not in logged


def test_held_out_data_is_reported_at_both_ends() -> None:
    start = measure(build(Base), HELD_OUT)
    module, hamu, trainer, _ = run(rule=TOWARDS, log_every_n_steps=1)
    assert readings(hamu)["holdout"] == pytest.approx([*start, 30])
    assert readings(hamu, "now")["holdout"] == pytest.approx([*measure(module, HELD_OUT), 30])
    assert "\n    held-out loss " in (hamu.summary or "") and "(30 samples)" in (hamu.summary or "")
    assert "hamu/holdout_level" in trainer.callback_metrics


@pytest.mark.parametrize("holds", [False, True])
def test_held_out_data_is_held_where_that_is_asked_for(holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    explain = RetainGuard.explain
    monkeypatch.setattr(
        RetainGuard,
        "explain",
        lambda self, what, start, now: (
            "the held-out loss rose"
            if what == "held-out" and start != now
            else None
            if what == "held-out" or what == "retain"
            else explain(self, what, start, now)
        ),
    )
    _, hamu, _, _ = run(rule=TOWARDS, guard=RetainGuard(every=1, max_returns=2, holdout=holds))
    assert (hamu.stop_reason is StopReason.RETAIN_GUARD) == holds
    assert "the held-out loss rose" in (hamu.stop_message or "") or not holds


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(*RETAIN.tensors, strict=True)


LOADERS: dict[str, Any] = {
    "loader": lambda: DataLoader(RETAIN, batch_size=16, shuffle=True),
    "stream": lambda: DataLoader(Stream(), batch_size=16),
    "batch sampler": lambda: DataLoader(RETAIN, batch_sampler=[[*range(i, i + 16)] for i in range(0, 96, 16)]),
    "combined": lambda: CombinedLoader({"retain": DataLoader(RETAIN, 16), "forget": DataLoader(FORGET, 16)}),
}


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_that_can_be_read_beside_the_fit(name: str) -> None:
    hamu = HAMUCallback(None if name == "combined" else DataLoader(FORGET, 20), GENTLE, guard=RetainGuard(samples=48))
    fit(build(Base), hamu, loader=LOADERS[name](), max_steps=2)
    start = readings(hamu)["retain"]
    assert start[2] == 48
    assert all(map(math.isfinite, start))


class Once:
    """Batches that are used up by reading them."""

    def __init__(self) -> None:
        self.batches = iter(DataLoader(RETAIN, 16))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.batches)


@pytest.mark.filterwarnings("ignore:.*your `IterableDataset`")
def test_where_it_cannot_be_read_twice_there_is_no_guard_and_it_is_said() -> None:
    hamu = HAMUCallback(DataLoader(FORGET, 20), GENTLE, guard=True)
    fit(build(Base), hamu, loader=Once(), max_epochs=-1, max_steps=2)
    assert hamu.combined_steps == 2
    assert "No guard over the retain data: Expected" in (hamu.summary or "")


class NeedsTraining(Base):
    """As detectors do: no loss in evaluation mode."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.training:
            raise RuntimeError("no loss here")
        return super().training_step(batch, batch_idx)


def test_a_module_without_a_loss_in_evaluation_mode_is_not_guarded() -> None:
    _, hamu, _, _ = run(NeedsTraining)
    assert "No guard over the retain data: measuring them in evaluation mode raised RuntimeError" in (
        hamu.summary or ""
    )


class Regression(Base):
    """No classes: there is a loss, and no accuracy."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return ((self(batch[0])[:, 0] - batch[1].float()) ** 2).mean()


class OneLogit(Regression):
    @override
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :1]


class OnPairs(Base):
    """Its forward pass takes something else than a batch has."""

    @override
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        raise NotImplementedError

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("kind", [OneLogit, OnPairs])
def test_where_predictions_cannot_be_read_the_loss_is_held_alone(kind: type[Base]) -> None:
    _, hamu, trainer, _ = run(kind, log_every_n_steps=1)
    loss, accuracy, _ = readings(hamu)["retain"]
    assert math.isfinite(loss) and math.isnan(accuracy)
    assert "hamu/retain_level" in trainer.callback_metrics
    assert "hamu/retain_accuracy" not in trainer.callback_metrics
    assert "accuracy" not in (hamu.summary or "")


def test_the_objective_of_the_retain_stream_is_what_is_held() -> None:
    _, hamu, _, _ = run(NeedsTraining, retain_objective=CrossEntropy())  # its own step does not run
    assert readings(hamu)["retain"][0] == pytest.approx(measure(build(Base), RETAIN)[0])


def test_positions_come_from_the_sampler() -> None:
    loader = DataLoader(RETAIN, batch_size=8, sampler=SubsetRandomSampler(range(50, 60)))
    assert choose_positions(loader, 1000, seed=0) == [*range(50, 60)]
    drawn = choose_positions(DataLoader(RETAIN, batch_size=8, shuffle=True), 20, seed=0)
    assert drawn is not None and len(set(drawn)) == 20 and drawn == sorted(drawn)
    assert drawn == choose_positions(DataLoader(RETAIN, batch_size=4), 20, seed=0)
    assert drawn != choose_positions(DataLoader(RETAIN, batch_size=4), 20, seed=1)


def test_batches_where_there_are_no_positions() -> None:
    assert choose_place([1, 2], 100, 0, per_batch=16) == {"batches": 7}
    assert count_batches(100, math.nan) == 32


@pytest.mark.parametrize("every", [2, 3])
def test_what_it_costs(every: int) -> None:
    """One pass of the excerpt at the start, every so many steps, and at the end."""

    class Counts(Base):
        passes = 0

        @override
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            Counts.passes += not self.training
            return super().training_step(batch, batch_idx)

    run(Counts, guard=RetainGuard(every=every, samples=32), max_epochs=2)
    assert Counts.passes == 2 * (12 // every + 1)  # of two batches each
