"""Steps that are verified together: fewer passes, and a broken promise that is found late leaves nothing behind."""

from __future__ import annotations

import copy
import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, VerifySteps
from hamu_lightning.callbacks import NotFinite, StopReason
from hamu_lightning.callbacks.goals._promises import Outcome
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.rules import FixedRadius, RelativeQuota, RelativeRadius, TargetQuota
from tests.callbacks.modules import Base, WithBatchNorm, WithDropout, build, fit, make_data, trained_on
from tests.distributed import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:The base optimizer", "ignore:The dirpath has changed")
FORGET = make_data(40, seed=9)
GENTLE = HAMUQ(RelativeQuota(0.3), radius=FixedRadius(0.01))
AUTO = VerifySteps(every="auto", tolerance=0.0)


class Counting(Base):
    passes = 0

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        Counting.passes += 1  # not on the module, which is put back after each pass
        return super().training_step(batch, batch_idx)


class Watch(Callback):
    """Looks at the end of each batch: passes so far, whether steps wait, combined steps, weights."""

    def __init__(self, hamu: HAMUCallback) -> None:
        self.hamu = hamu
        self.passes: list[int] = []
        self.waits: list[bool] = []
        self.combined: list[int] = []
        self.weights: list[dict[str, Any]] = []

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        assert self.hamu._fit is not None and self.hamu._fit.parts.verifier is not None
        self.passes.append(Counting.passes)
        self.waits.append(self.hamu._fit.parts.verifier.waiting is not None)
        self.combined.append(self.hamu.combined_steps)
        self.weights.append(copy.deepcopy(pl_module.state_dict()))


def train(
    verify: VerifySteps = AUTO, kind: type[Base] = Counting, optimizer: str = "sgd", **options: Any
) -> tuple[Any, HAMUCallback, Watch]:
    Counting.passes = 0
    module = build(kind, optimizer)
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=20, shuffle=True), GENTLE, verify=verify)
    watch = Watch(hamu)
    fit(module, hamu, watch, **{"loader": DataLoader(make_data(192), batch_size=8, shuffle=True), **options})
    return module, hamu, watch


def judge_by(monkeypatch: pytest.MonkeyPatch, broken: set[int]) -> None:
    """Let the judgements of these numbers, counted from 0, be that a promise was broken."""
    count = iter(range(1000))
    for name in ("is_kept", "is_harmless"):
        monkeypatch.setattr(Outcome, name, lambda *_: next(count) not in broken)


def test_one_step_then_two_four_and_eight() -> None:
    """Two passes for the first one, four for each row of more."""
    _, hamu, watch = train(max_epochs=1)
    added = [b - a - 2 for a, b in zip([0, *watch.passes], watch.passes, strict=False)]
    assert added == [2, 0, 4, 0, 0, 0, 4, *[0] * 7, 4, *[0] * 7, 4, 2]  # at the end of the epoch what is there
    assert watch.waits == [number == 0 for number in added]
    verifier = hamu.state_dict()["verifier"]
    assert (verifier["verified"], verifier["kept"], verifier["together"]) == (24, 24, 8)


@pytest.mark.parametrize("kind", [WithBatchNorm, WithDropout])
def test_kept_steps_are_those_of_a_run_without_verification(kind: type[Base]) -> None:
    module, hamu, _ = train(kind=kind, max_epochs=1)
    plain = build(kind)
    other = HAMUCallback(DataLoader(FORGET, batch_size=20, shuffle=True), GENTLE)
    fit(plain, other, loader=DataLoader(make_data(192), batch_size=8, shuffle=True), max_epochs=1)
    assert hamu.state_dict()["verifier"]["kept"] == 24
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)


# The judgements: of step 1; of 2 and 3 together, of 3; of 4 to 7 together, of 7; and so on.
@pytest.mark.parametrize(("broken", "at", "back_to"), [(1, 2, 0), (2, 2, 0), (3, 6, 2), (4, 6, 2), (6, 14, 6)])
def test_a_broken_promise_takes_back_all_steps_since(
    broken: int, at: int, back_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_by(monkeypatch, {broken})
    _, hamu, watch = train(max_steps=at + 4)
    torch.testing.assert_close(watch.weights[at], watch.weights[back_to], rtol=0, atol=0)
    assert watch.combined[at] == back_to + 1
    assert watch.waits[at : at + 3] == [False, False, True]  # one by one again
    state = hamu.state_dict()
    assert state["left_out_steps"] == state["verifier"]["dropped"] == at - back_to
    assert hamu.combined_steps == back_to + 4


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_steps_that_do_not_follow_the_rule_are_verified_one_by_one(optimizer: str) -> None:
    _, hamu, watch = train(optimizer=optimizer, max_steps=5)
    assert not any(watch.waits) and hamu.state_dict()["verifier"]["together"] == 1


class Ruined(Callback):
    """After some steps, makes the weights useless, as a step that is far too long would."""

    def __init__(self, at: int, factor: float) -> None:
        self.at, self.factor = at, factor

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.mul_(self.factor)
            self.at = -1


@pytest.mark.parametrize("factor", [-30.0, float("nan")])
def test_what_ruined_the_model_is_found_and_undone(factor: float) -> None:
    """In the 9th step, of 8 that are verified together; found at the 15th, with a reason to stop besides."""
    module = build(Base)
    verify = VerifySteps(every="auto")
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=40), GENTLE, verify=verify, stop_on=[NotFinite(patience=1)])
    watch = Watch(hamu)
    fit(module, hamu, Ruined(9, factor), watch, loader=DataLoader(make_data(384), batch_size=16), max_epochs=1)
    assert hamu.stop_reason is None and len(watch.weights) == 24
    assert all(bool(x.isfinite().all()) and float(x.abs().max()) < 3 for x in watch.weights[-1].values())
    found = next(n for n in range(9, 24) if watch.combined[n] < watch.combined[n - 1])
    torch.testing.assert_close(watch.weights[found], watch.weights[6], rtol=0, atol=0)
    assert hamu.combined_steps == 7 + 24 - (found + 1)


def test_levels_are_measured_on_verified_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the target counts as reached there."""
    from hamu_lightning.callbacks.goals import Approach

    data, waits = make_data(320, seed=9), []
    rule = HAMUQ(TargetQuota(0.6, steps=30), radius=RelativeRadius(0.01))
    hamu = HAMUCallback(DataLoader(data, batch_size=320), rule, verify=VerifySteps(every="auto"), guard=True)
    look = Approach.look

    def watched(approach: Approach, *args: Any, **kwargs: Any) -> None:
        is_due = approach.is_due
        look(approach, *args, **kwargs)
        assert hamu._fit is not None and hamu._fit.parts.verifier is not None
        waits.append((is_due, hamu._fit.parts.verifier.waiting is not None))

    monkeypatch.setattr(Approach, "look", watched)
    fit(trained_on(data, 100), hamu, max_epochs=-1, max_steps=60)
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    assert (True, True) not in waits and (False, True) in waits
    assert waits[-1] == (True, False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_the_last_verified_weights(error: type[BaseException], tmp_path: Path) -> None:
    class Fails(Callback):
        @override
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 12:
                raise error

        @override
        def on_exception(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "after.ckpt")

    module = build(Base)
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=20), GENTLE, verify=AUTO)
    watch = Watch(hamu)
    with pytest.raises((error, SystemExit)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, hamu, watch, Fails(), loader=DataLoader(make_data(192), batch_size=8), max_epochs=1)
    assert watch.waits[-1] and hamu.combined_steps == 7
    torch.testing.assert_close(module.state_dict(), watch.weights[6], rtol=0, atol=0)
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    torch.testing.assert_close(saved["state_dict"], watch.weights[6], rtol=0, atol=0)


def test_a_resumed_run_goes_on_from_verified_weights(tmp_path: Path) -> None:
    """Of a checkpoint that was saved while steps were waiting; nobody has their batches any more."""
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    module = build(Base)
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=20), GENTLE, verify=AUTO)
    watch = Watch(hamu)
    loader = DataLoader(make_data(192), batch_size=8)
    fit(module, hamu, watch, saver, loader=loader, max_epochs=1, enable_checkpointing=True)
    resumed = HAMUCallback(DataLoader(FORGET, batch_size=20), GENTLE, verify=AUTO)
    start: list[Any] = []

    class Looks(Callback):
        @override
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            start.append((copy.deepcopy(pl_module.state_dict()), resumed.combined_steps))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            build(Base, seed=99),
            resumed,
            Looks(),
            loader=loader,
            max_epochs=1,
            ckpt_path=tmp_path / "step=10.ckpt",
        )
    torch.testing.assert_close(start[0][0], watch.weights[6], rtol=0, atol=0)
    assert start[0][1] == 7
    assert resumed.combined_steps == 7 + 14


def test_the_ledger_says_how_many_steps_a_line_is_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge_by(monkeypatch, {3})
    train(VerifySteps(every="auto", ledger=tmp_path / "ledger.csv"), max_steps=7)
    lines = list(csv.DictReader((tmp_path / "ledger.csv").read_text().splitlines()))
    assert [(line["steps"], line["verdict"]) for line in lines] == [
        ("1", "accept"),
        ("2", "accept"),
        ("1", "accept"),
        ("4", "back"),
    ]


def test_bad_settings() -> None:
    with pytest.raises(HAMUValueError, match="Expected `every` to be"):
        VerifySteps(every="always")  # type: ignore[arg-type]


def verify_on_ranks(rank: int) -> tuple[list[float], dict[str, Any]]:
    from lightning.pytorch.strategies import DDPStrategy

    warnings.simplefilter("ignore")
    strategy = DDPStrategy(process_group_backend="gloo")
    module, hamu, watch = train(strategy=strategy, devices=2, max_epochs=1)
    return [float(p.detach().double().sum()) for p in module.parameters()], hamu.state_dict()["verifier"]


def test_processes_judge_alike() -> None:
    first, second = run_ranks(verify_on_ranks, 2)
    assert first == second
    assert first[1]["verified"] == 12
