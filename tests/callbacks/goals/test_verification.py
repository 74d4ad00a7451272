"""Verified steps: promises are measured, broken ones undone exactly, and the region follows."""

from __future__ import annotations

import copy
import csv
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, VerifySteps
from hamu_lightning.callbacks import StopReason
from hamu_lightning.callbacks.goals._promises import GroupOutcome, Outcome
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.rules import FixedRadius, RelativeQuota, TargetQuota
from tests.callbacks.modules import Base, EditsItsBatch, WithBatchNorm, WithDropout, build, fit, make_data
from tests.distributed import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:The base optimizer")
FORGET = make_data(40, seed=9)
GENTLE = HAMUQ(RelativeQuota(0.3), radius=FixedRadius(0.01))
RECKLESS = HAMUQ(0.05, radius=FixedRadius(10.0))
OK = {
    "retain_loss": 1.0,
    "forget_loss": 2.0,
    "promised_retain": -0.1,
    "promised_forget": 0.2,
    "due_forget": 0.2,
    "measured_retain": -0.1,
    "measured_forget": 0.2,
}


@pytest.mark.parametrize(
    ("changes", "is_kept"),
    [
        ({}, True),
        ({"measured_forget": 0.11}, True),
        ({"measured_forget": 0.09}, False),  # less than half of the promise
        ({"measured_forget": 1.59}, True),
        ({"measured_forget": 1.61}, False),  # more than 3 promises and half of its value
        ({"measured_retain": -0.24}, True),
        ({"measured_retain": -0.26}, False),  # more than 1.5 times the damage and a tenth of its value
        ({"promised_retain": 0.5, "measured_retain": -0.11}, False),  # no damage was promised
        ({"due_forget": 0.1, "measured_forget": 0.06}, True),  # another optimizer makes less of it
        ({"due_forget": 9.0, "measured_forget": 0.11}, True),  # or would make more
        ({"promised_forget": -0.2, "measured_forget": -0.29}, True),  # past a target it may fall
        ({"promised_forget": -0.2, "measured_forget": -0.31}, False),
        ({"promised_forget": 1e-7, "measured_forget": -1e-6}, True),  # less than a loss is known to
        ({"measured_forget": math.nan}, False),
        ({"measured_retain": -math.inf}, False),
    ],
)
def test_what_counts_as_kept(changes: dict[str, float], is_kept: bool) -> None:
    given = {**OK, **changes}
    retain, forget = (
        GroupOutcome(
            name == "forget",
            given[f"{name}_loss"],
            given[f"promised_{name}"],
            given.get(f"due_{name}", given[f"promised_{name}"]),
            given[f"measured_{name}"],
        )
        for name in ("retain", "forget")
    )
    outcome = Outcome({"retain": retain, "forget": forget})
    assert outcome.numbers() == given
    assert outcome.is_kept(tolerance=0.5) is is_kept


class Spy(Callback):
    """Looks at each step, and at the region."""

    def __init__(self, hamu: HAMUCallback) -> None:
        self.hamu, self.regions, self.outcome = hamu, [], None  # type: ignore[var-annotated]

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        assert self.hamu._fit is not None and self.hamu._fit.parts.verifier is not None
        self.regions.append(self.hamu._fit.parts.verifier.region)
        self.outcome = self.hamu._fit.parts.verifier.outcome


def train(
    rule: Any, verify: VerifySteps | None, kind: type[Base] = Base, optimizer: str = "sgd", **options: Any
) -> tuple[Base, HAMUCallback, Any]:
    module = build(kind, optimizer)
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=20, shuffle=True), rule, verify=verify)
    callbacks = [hamu] if verify is None else [hamu, spy := Spy(hamu)]
    _, recorder = fit(module, *callbacks, **options)
    return module, hamu, recorder if verify is None else spy


@pytest.mark.parametrize("kind", [Base, WithBatchNorm, WithDropout, EditsItsBatch])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_kept_steps_are_those_of_a_run_without_verification(kind: type[Base], optimizer: str) -> None:
    """No trace: not in weights, buffers, logged values, random numbers, batches."""
    plain, _, values = train(GENTLE, None, kind, optimizer)
    module = build(kind, optimizer)
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=20, shuffle=True), GENTLE, verify=VerifySteps(tolerance=0.0))
    _, recorder = fit(module, hamu)
    verifier = hamu.state_dict()["verifier"]
    assert (verifier["verified"], verifier["kept"], verifier["retried"]) == (12, 12, 0)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), module.buffers(), strict=True))
    assert recorder.values == values.values


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_broken_steps_are_undone_exactly(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and the optimizer's state, from the first step on, when there is no state yet."""
    monkeypatch.setattr(Outcome, "is_kept", lambda *_: False)
    module = build(Base, optimizer)
    before = copy.deepcopy(module.state_dict())
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=20), GENTLE, verify=VerifySteps(shrink=0.9))
    with pytest.raises(Exception, match="ended with 0 combined steps"):
        trainer, _ = fit(module, hamu, max_epochs=1)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())
    assert hamu.left_out_steps == hamu.state_dict()["verifier"]["dropped"] == 6


def test_a_retried_step_is_the_one_of_the_smaller_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the rule had had the smaller radius at once."""
    verdicts = iter([True, False, True, True, True, True])
    monkeypatch.setattr(Outcome, "is_kept", lambda *_: next(verdicts))
    tried, _, _ = train(GENTLE, VerifySteps(grow=1.0), max_steps=2)

    class Shrinks(Callback):
        @override
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                trainer.optimizers[0]._core.rule = GENTLE.in_region(0.5)

    module = build(Base)
    fit(module, Shrinks(), HAMUCallback(DataLoader(FORGET, batch_size=20, shuffle=True), GENTLE), max_steps=2)
    assert all(torch.equal(a, b) for a, b in zip(tried.parameters(), module.parameters(), strict=True))


def loss_on(module: Base, data: Any) -> float:
    x, y = next(iter(DataLoader(data, batch_size=1000)))
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module(x), y))


def test_a_reckless_radius_costs_time_and_not_the_model() -> None:
    ruined, _, _ = train(RECKLESS, None, max_epochs=4)
    module, hamu, spy = train(RECKLESS, VerifySteps(max_tries=8), max_epochs=4)
    assert loss_on(ruined, make_data()) > 50
    assert loss_on(module, make_data()) < 3
    assert min(spy.regions) < 0.1
    assert hamu.combined_steps >= 0.8 * 24


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_other_bases_make_shorter_steps(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At half the region the weights go half of the base's way, and the base's state is that of one step."""
    verdicts = iter([False, True])
    monkeypatch.setattr(Outcome, "is_kept", lambda *_: next(verdicts))
    start = build(Base, optimizer)
    halved, hamu, _ = train(GENTLE, VerifySteps(), optimizer=optimizer, max_steps=1)
    assert hamu.summary is not None and "HAMU: 1 combined step (0 left out)" in hamu.summary
    assert (
        "Of 1 verified step 1 kept its promise (1 of them in a smaller trust region), 0 were left out" in hamu.summary
    )
    whole, other, _ = train(GENTLE, None, optimizer=optimizer, max_steps=1)
    for a, b, c in zip(start.parameters(), halved.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(b, (a + c) / 2)
    states = [h.trainer.optimizers[0].state for h in (halved, whole)]
    for a, b in zip(states[0].values(), states[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_region_shrinks_and_grows_back(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter([False, False, True, True, True, True, True, True])
    monkeypatch.setattr(Outcome, "is_kept", lambda *_: next(verdicts))
    _, _, spy = train(GENTLE, VerifySteps(), max_epochs=1)
    assert spy.regions == pytest.approx([0.25, 0.375, 0.5625, 0.84375, 1.0, 1.0])


def test_it_ends_where_no_region_is_small_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outcome, "is_kept", lambda *_: False)
    _, hamu, _ = train(GENTLE, VerifySteps(shrink=1e-2), max_epochs=4)
    assert hamu.stop_reason is StopReason.PROMISES_BROKEN
    assert hamu.stop_message is not None and hamu.stop_message.startswith("Of 2 verified steps 0 kept their promise")


@pytest.mark.parametrize(("every", "accumulation", "verified"), [(1, 1, 12), (3, 1, 4), (1, 3, 4), (2, 3, 2)])
def test_extra_forward_passes(every: int, accumulation: int, verified: int) -> None:
    """Two per micro-batch of each verified step, none else."""

    class Counts(Base):
        passes = 0

        @override
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            Counts.passes += 1
            return super().training_step(batch, batch_idx)

    train(GENTLE, VerifySteps(every=every, tolerance=0.0), Counts, accumulate_grad_batches=accumulation)
    assert Counts.passes == 2 * 12 + 2 * verified * accumulation


def test_what_was_measured_is_logged_and_in_the_ledger(tmp_path: Path) -> None:
    ledger = tmp_path / "new" / "ledger.csv"
    module = build(Base)
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=20), RECKLESS, verify=VerifySteps(ledger=ledger))
    trainer, _ = fit(module, hamu, max_epochs=1)
    lines = list(csv.DictReader(ledger.read_text().splitlines()))
    assert list(lines[0]) == ["step", "try", "region", *OK, "verdict"]
    assert lines[0]["verdict"] == "retry" and lines[1]["try"] == "2"
    assert float(lines[0]["measured_forget"]) != float(lines[1]["measured_forget"])
    metrics = trainer.callback_metrics
    for name in ("promised_forget", "measured_forget", "promised_retain", "measured_retain"):
        assert float(metrics[f"hamu/{name}"]) == pytest.approx(float(lines[-1][name]), rel=1e-5)  # float32


@pytest.mark.parametrize(("ledger", "is_there"), [(True, True), (False, False)])
def test_the_ledger_lies_beside_the_log(ledger: bool, is_there: bool, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=20), GENTLE, verify=VerifySteps(ledger=ledger))
    fit(build(Base), hamu, logger=logger, max_steps=2)
    assert (Path(logger.log_dir) / "hamu_ledger.csv").exists() == is_there


def test_measured_changes_are_those_of_the_losses() -> None:
    """With the whole data as one batch, against losses by hand before and after."""
    module = build(Base)
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=40), GENTLE, verify=VerifySteps())
    spy, before = Spy(hamu), (loss_on(module, make_data()), loss_on(module, FORGET))
    fit(module, hamu, spy, loader=DataLoader(make_data(), batch_size=96), max_epochs=1, log_every_n_steps=1)
    after = loss_on(module, make_data()), loss_on(module, FORGET)
    assert hamu.last_step is not None
    assert spy.outcome is not None
    retain, forget = spy.outcome.groups.values()
    assert retain.measured == pytest.approx(before[0] - after[0], abs=1e-6)  # float32
    assert forget.measured == pytest.approx(after[1] - before[1], abs=1e-6)
    assert forget.promised == pytest.approx(float(hamu.last_step.coefficients.forget_improvement))


def test_batches_are_run_again_as_they_were() -> None:
    """A module that edits its batch, and one that finds it edited, measure the same."""
    outcomes = []
    for kind, scale, shift in ((EditsItsBatch, 1.0, 0.0), (Base, 0.5, 0.1)):
        parts = [data.tensors for data in (make_data(), FORGET)]
        retain, forget = (DataLoader(TensorDataset(x * scale + shift, y), batch_size=20) for x, y in parts)
        hamu = HAMUCallback(forget, GENTLE, verify=VerifySteps())
        spy = Spy(hamu)
        fit(build(kind), hamu, spy, loader=retain, max_epochs=1)
        outcomes.append(list(spy.outcome.numbers().values()))
    assert outcomes[0] == pytest.approx(outcomes[1], abs=1e-6)  # float32


def test_a_retried_step_counts_once_on_the_way_to_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter([False, True, False, False, False, True])
    monkeypatch.setattr(Outcome, "is_kept", lambda *_: next(verdicts))
    rule = HAMUQ(TargetQuota(9.0), radius=FixedRadius(1e-3))
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=40), rule, verify=VerifySteps())
    with pytest.warns(UserWarning, match="before the target"):
        fit(build(Base), hamu, max_steps=3)
    state = hamu.state_dict()["optimizer"]
    assert (state["steps"], state["undone_steps"], state["aims"]["forget"]["taken"]) == (3, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "Expected `every` to be at least 1, but got 0"),
        ({"tolerance": 1.5}, "Expected `tolerance` to be between 0 and 1"),
        ({"shrink": 1.0}, "Expected `shrink` to be between"),
        ({"grow": 0.5}, "Expected `grow` to be at least 1"),
        ({"max_tries": 0}, "Expected `max_tries` to be at least 1"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        VerifySteps(**arguments)
    with pytest.raises(HAMUValueError, match="Expected `verify` to be VerifySteps"):
        HAMUCallback(FORGET, GENTLE, verify="yes")  # type: ignore[arg-type]


def test_a_target_is_verified_unless_told_not_to() -> None:
    assert HAMUCallback(FORGET, target=1.0).settings.verify == VerifySteps()
    assert HAMUCallback(FORGET, target=1.0, verify=False).settings.verify is None
    assert HAMUCallback(FORGET, GENTLE).settings.verify is None
    assert HAMUCallback(FORGET, GENTLE, verify=True).settings.verify == VerifySteps()


def verify_on_ranks(rank: int) -> tuple[list[float], dict[str, Any]]:
    from lightning.pytorch.strategies import DDPStrategy

    warnings.simplefilter("ignore")
    strategy = DDPStrategy(process_group_backend="gloo")
    module, hamu, spy = train(RECKLESS, VerifySteps(max_tries=8), strategy=strategy, devices=2)
    return spy.regions + [float(p.detach().double().sum()) for p in module.parameters()], hamu.state_dict()["verifier"]


def test_processes_judge_alike() -> None:
    first, second = run_ranks(verify_on_ranks, 2)
    assert first == second
    assert first[1]["verified"] == 6 and min(first[0][:6]) < 0.1


def test_a_step_that_is_not_finite_is_not_judged() -> None:
    """Its losses say nothing of the promise: it is left out at once, and the region stays."""

    class Overflows(Base):
        @override
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * math.inf if batch_idx == 1 else loss

    _, hamu, spy = train(GENTLE, VerifySteps(tolerance=0.0), Overflows, max_epochs=1)
    assert spy.regions == [1.0] * 6
    assert (hamu.left_out_steps, hamu.state_dict()["verifier"]["dropped"]) == (1, 0)


def test_the_level_follows_the_shortened_step_of_another_base(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter([False, False, True])
    monkeypatch.setattr(Outcome, "is_kept", lambda *_: next(verdicts))
    rule = HAMUQ(TargetQuota(9.0), radius=FixedRadius(1e-3))
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=40), rule, verify=VerifySteps())
    spy, module = Spy(hamu), build(Base, "momentum")
    before = loss_on(module, FORGET)
    with pytest.warns(UserWarning, match="before the target"):
        fit(module, hamu, spy, max_steps=1)
    level = float(hamu.state_dict()["optimizer"]["aims"]["forget"]["level"])
    assert level - before == pytest.approx(loss_on(module, FORGET) - before, rel=0.05)  # to first order
