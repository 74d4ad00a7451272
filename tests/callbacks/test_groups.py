"""Several requests and protected groups in one fit."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, VerifySteps
from hamu_lightning.callbacks import PassOptions, StepOptions, StopReason
from hamu_lightning.callbacks.goals._kept_weights import KeptWeights
from hamu_lightning.rules import FixedRadius, TargetQuota
from hamu_lightning.solvers import FeasibleDirection, GroupCoefficients
from tests.callbacks.many import DATA, RADIUS, flat, loader, make_callback
from tests.callbacks.modules import Base, StatefulLSTM, WithBatchNorm, WithDropout, build, fit, make_data
from tests.distributed import run_ranks

GROUPS = ("rare/", "a/", "b/")


class Steps(Callback):
    """Notes the numbers of each step."""

    def __init__(self, hamu: HAMUCallback) -> None:
        self.hamu, self.steps = hamu, []  # type: ignore[var-annotated]

    @override
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        step = self.hamu.last_step
        assert step is not None and isinstance(step.coefficients, GroupCoefficients)
        self.steps.append({name: float(value) for name, value in step.coefficients.improvements.items()})


@pytest.mark.parametrize("kind", [Base, WithBatchNorm, WithDropout, StatefulLSTM])
def test_every_step_promises_each_group_its_due(kind: type[Base]) -> None:
    hamu = make_callback()
    steps = Steps(hamu)
    fit(build(kind), hamu, steps)
    assert hamu.combined_steps == 12 and hamu.forget_passes == 36
    for step in steps.steps:
        assert step["a"] >= 0.01 * (1 - 1e-6) and step["b"] >= 0.005 * (1 - 1e-6)
        assert step["rare"] >= -1e-9  # rounding of float32 gradients


def test_one_group_is_the_plain_callback() -> None:
    """Named or not: with one request the same weights."""
    ends = []
    for forget in (loader("a"), {"forget": loader("a")}):
        module = build(Base)
        fit(module, HAMUCallback(forget, FeasibleDirection({"forget": 0.01}, radius=RADIUS)))
        ends.append(flat(module))
    assert torch.equal(*ends)
    module = build(Base)
    fit(module, HAMUCallback(loader("a"), HAMUQ(0.01, radius=RADIUS, blocks="global")))
    torch.testing.assert_close(flat(module), ends[0], rtol=0, atol=1e-5)  # float32, 12 steps


@pytest.mark.filterwarnings("ignore:No weight has moved")
@pytest.mark.parametrize("kind", [WithBatchNorm, WithDropout])
def test_the_groups_leave_no_trace(kind: type[Base]) -> None:
    """With no radius worth speaking of the retain stream sees what it would see alone: I1 for many groups."""
    rule = FeasibleDirection({"a": 0.0, "b": 0.0}, {"rare": 0.0}, radius=FixedRadius(1e-30))
    module, plain = build(kind), build(kind)
    _, recorder = fit(module, make_callback(rule, passes=PassOptions(batchnorm="retain")))
    _, expected = fit(plain, _Rests())
    own = [{name: v for name, v in row.items() if not name.startswith(GROUPS)} for row in recorder.values]
    assert own == expected.values
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), plain.buffers(), strict=True))


class _Rests(Callback):
    """Plain training at a learning rate of 0."""

    @override
    def on_train_start(self, trainer: Any, *_: Any) -> None:
        trainer.optimizers[0].param_groups[0]["lr"] = 0.0


@pytest.mark.parametrize(
    ("settings", "passes"), [({}, 36), ({"accumulate_grad_batches": 3}, 36), ({"max_epochs": 1}, 18)]
)
def test_passes(settings: dict[str, Any], passes: int) -> None:
    """One for each group and micro-batch."""
    hamu = make_callback()
    fit(build(Base), hamu, **settings)
    assert hamu.forget_passes == passes


def test_groups_in_turn() -> None:
    """All in the first step, then so many per step, one after the other, whatever their number."""
    hamu = make_callback(passes=PassOptions(groups_per_step=2))
    fit(build(Base), hamu, max_epochs=1)
    state = hamu.state_dict()["groups"]
    assert {name: group["passes"] for name, group in state.items()} == {"rare": 4, "a": 4, "b": 5}
    assert hamu.last_step is not None and hamu.last_step.coefficients.groups == ("retain", "rare", "a", "b")


def test_a_request_leaves_when_it_has_met_its_target(caplog: pytest.LogCaptureFixture) -> None:
    """The other goes on without it; the fit ends where the losses of both are there, at the same weights."""
    targets = {"a": TargetQuota(1.4, steps=15), "b": TargetQuota(1.8, steps=15)}
    rule = FeasibleDirection(targets, {"rare": 0.0}, radius=FixedRadius(0.2))
    module = build(Base)
    hamu = make_callback(rule)
    with caplog.at_level("INFO"):
        fit(module, hamu, max_epochs=40)
    state = hamu.state_dict()["groups"]
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    assert hamu.stop_message is not None and hamu.stop_message.startswith("a: forget loss 1.")
    assert "'a' leaves the problem" in caplog.text
    assert state["a"]["passes"] < state["rare"]["passes"]
    assert_all_reached(module, targets)


def assert_all_reached(module: Base, targets: dict[str, TargetQuota]) -> None:
    for name, quota in targets.items():
        x, y = DATA[name].tensors
        loss = float(nn.functional.cross_entropy(module(x), y).detach())
        assert 0.95 * quota.target <= loss <= 1.15 * quota.target  # type: ignore[operator]


def test_a_request_that_fell_back_is_forgotten_again(caplog: pytest.LogCaptureFixture) -> None:
    """The steps for the others can undo it: all are reached only where all are, at the same weights."""
    targets = {"a": TargetQuota(1.4, steps=15), "b": TargetQuota(1.8, steps=15)}
    module = build(Base)
    hamu, before = (
        make_callback(FeasibleDirection(targets, {"rare": 0.0}, radius=FixedRadius(0.2))),
        copy.deepcopy(module.state_dict()),
    )

    class Relapse(Callback):
        """Puts the first weights back, once, after a request has left."""

        has_happened = False

        @override
        def on_train_batch_end(self, *_: Any) -> None:
            groups = hamu.state_dict()["groups"]
            if not self.has_happened and any(groups[name]["is_done"] for name in targets):
                self.has_happened = True
                module.load_state_dict(before)

    with caplog.at_level("INFO"):
        fit(module, hamu, Relapse(), max_epochs=60)
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    assert "comes back into the problem" in caplog.text
    assert_all_reached(module, targets)


def test_a_request_is_added_between_epochs() -> None:
    hamu = make_callback()

    class Adds(Callback):
        @override
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 0:
                hamu.add_request("c", loader("c"), 0.004)

    steps = Steps(hamu)
    fit(build(Base), hamu, Adds(), steps)
    assert "c" not in steps.steps[5] and steps.steps[6]["c"] >= 0.004 * (1 - 1e-6)
    assert hamu.state_dict()["groups"]["c"]["passes"] == 6
    # The others have not noticed: a fit with all of them from the start draws the same batches.
    twin = make_callback()
    twin.add_request("c", loader("c"), 0.004)
    fit(build(Base), twin)
    assert twin.state_dict()["groups"]["a"] == hamu.state_dict()["groups"]["a"]


@pytest.mark.filterwarnings("ignore:The fit has ended before the target")  # 1.228 of 1.3
def test_a_request_alone_lands_until_another_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near its target a request keeps the weights of each step, to go back to; not where a step is others' as well."""
    hamu = HAMUCallback({"a": loader("a")}, FeasibleDirection({"a": TargetQuota(1.3)}, radius=RADIUS))
    kept: list[int] = []

    class Adds(Callback):
        @override
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            keep = KeptWeights.keep
            monkeypatch.setattr(
                KeptWeights, "keep", lambda weights: (kept.append(trainer.current_epoch), keep(weights))
            )

        @override
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 0:
                hamu.add_request("c", loader("c"), 0.004)

    fit(build(Base), hamu, Adds())
    assert hamu.combined_steps > 6
    assert set(kept) == {0}


def test_resumed_in_the_middle(tmp_path: Path) -> None:
    """Bit by bit, with a request that was added before the interruption."""

    def run(max_epochs: int, ckpt_path: Any = None) -> tuple[Tensor, Any, Any]:
        hamu, module = make_callback(), build(Base)
        hamu.add_request("c", loader("c"), 0.002)
        data = DataLoader(make_data(), batch_size=16)
        trainer, _ = fit(module, hamu, loader=data, max_epochs=max_epochs, ckpt_path=ckpt_path)
        return flat(module), trainer, hamu

    expected, _, whole = run(4)
    _, trainer, _ = run(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _, hamu = run(4, tmp_path / "half.ckpt")
    assert torch.equal(resumed, expected)
    assert hamu.state_dict()["groups"] == whole.state_dict()["groups"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.filterwarnings("ignore:The base optimizer")
def test_verified_steps_judge_every_group(optimizer: str, tmp_path: Path) -> None:
    """A radius that is far too large: without verification the protected loss explodes."""
    rule = FeasibleDirection({"a": 0.05, "b": 0.05}, {"rare": 0.0}, radius=FixedRadius(5.0))
    verify = VerifySteps(max_tries=8, ledger=tmp_path / "ledger.csv")
    ends = []
    for option in (verify, None):
        module = build(Base, optimizer)
        hamu = make_callback(rule, verify=option, steps=StepOptions(exact=True))
        fit(module, hamu, max_epochs=3)
        x, y = DATA["rare"].tensors
        ends.append(float(nn.functional.cross_entropy(module(x), y).detach()))
    assert ends[0] < 1.3 and ends[1] > 3
    head = (tmp_path / "ledger.csv").read_text().splitlines()[0].split(",")
    assert [n for n in head if n.startswith("promised")] == [f"promised_{n}" for n in ("retain", "rare", "a", "b")]


def fit_on_ranks(rank: int) -> tuple[list[float], int]:
    from lightning.pytorch.strategies import DDPStrategy

    warnings.simplefilter("ignore")
    module, hamu = build(Base).double(), make_callback()
    strategy = DDPStrategy(process_group_backend="gloo")
    fit(module, hamu, strategy=strategy, devices=2, precision="64-true", max_epochs=1)
    return flat(module).tolist(), hamu.combined_steps


def test_processes_take_the_same_steps() -> None:
    first, second = run_ranks(fit_on_ranks, 2)
    assert first == second
    assert first[1] == 3


@pytest.mark.parametrize("kind", [Base, WithBatchNorm, WithDropout])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_sketches_tend_to_the_exact_run(kind: type[Base], accumulation: int) -> None:
    """The passes are made again on the same batches with the same random numbers, and leave no trace."""
    ends, logged = [], []
    for sketch in (None, 2**18):
        module, hamu = build(kind), make_callback(steps=StepOptions(sketch=sketch))
        _, recorder = fit(module, hamu, max_epochs=1, accumulate_grad_batches=accumulation)
        ends.append(flat(module))
        logged.append(recorder.values[0])
    moved = (ends[0] - flat(build(kind))).norm()
    assert float((ends[0] - ends[1]).norm() / moved) < 0.05  # 1/sqrt(2^18) is 0.002, in each of six steps
    assert logged[0] == logged[1]
