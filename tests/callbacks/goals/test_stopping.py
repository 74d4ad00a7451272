"""When a fit ends by itself: conditions over several steps, ceilings and the way back, delayed stops, the score."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.callbacks import (
    CollateralDamage,
    ForgetAbove,
    Infeasible,
    NotFinite,
    PassOptions,
    RetainAbove,
    StopCondition,
    StopReason,
)
from hamu_lightning.callbacks.goals._score import compute_score
from hamu_lightning.callbacks.goals._signals import Signals
from hamu_lightning.callbacks.goals._stopper import StopMonitor
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.rules import FixedRadius
from tests.callbacks.modules import Base, build, fit, make_data

FORGET = make_data(40, seed=9)
RULE = HAMUQ(0.1, radius=FixedRadius(0.1))


def signals(**changes: float) -> Signals:
    numbers = dict.fromkeys(("quota", "given", "is_finite", "is_served"), 1.0)
    numbers |= {"feasible": 2.0, "retain_loss": 0.5, "forget_loss": 0.5}
    return Signals(**{**numbers, **changes}, bound="forget")


@pytest.mark.parametrize(
    ("condition", "name", "values", "stops_at"),
    [
        (CollateralDamage(), "feasible", [1.0, 0.99], 1),
        (CollateralDamage(epsilon=0.1), "feasible", [0.91, 0.89], 1),
        (CollateralDamage(patience=3), "feasible", [0.5, 1.5, 1.1, 0.9, 0.9], 4),  # means of three: 1.03, 1.17, 0.97
        (CollateralDamage(), "feasible", [math.nan, 0.5], 1),
        (Infeasible(), "is_served", [1.0, 0.0], 1),
        (Infeasible(patience=2), "is_served", [0.0, 1.0, 0.0, 0.0], 3),
        (RetainAbove(0.6, patience=2), "retain_loss", [9.0, 0.1, 0.5, 0.8], 1),
        (ForgetAbove(0.6, patience=1), "forget_loss", [0.6, 0.61], 1),
        (NotFinite(patience=2), "is_finite", [0.0, 1.0, 0.0, 0.0], 3),
    ],
)
def test_conditions(condition: StopCondition, name: str, values: list[float], stops_at: int) -> None:
    monitor = StopMonitor((condition,))
    found = [monitor.judge(signals(**{name: value})) for value in values]
    assert [i for i, stop in enumerate(found) if stop is not None][0] == stops_at
    assert found[stops_at][0] is condition.reason  # type: ignore[index]


def test_the_last_steps_are_in_the_checkpoint() -> None:
    first, second = (StopMonitor((RetainAbove(0.6, patience=2),)) for _ in range(2))
    assert first.judge(signals(retain_loss=0.9)) is None
    second.load_state_dict(first.state_dict())
    assert second.judge(signals(retain_loss=0.4)) is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CollateralDamage(patience=0), "Expected `patience` to be at least 1"),
        (lambda: CollateralDamage(epsilon=-0.1), "Expected `epsilon`"),
        (lambda: RetainAbove(math.nan), "Expected `loss`"),
        (lambda: HAMUCallback(FORGET, RULE, stop_on=[3]), "or conditions such as RetainAbove"),
    ],
)
def test_bad_conditions(make: Any, message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        make()


class History(Callback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.weights: list[list[torch.Tensor]] = []

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        (ForgetAbove(1.5, patience=1), StopReason.FORGET_CEILING),
        (RetainAbove(1.5, patience=1), StopReason.RETAIN_CEILING),
    ],
)
def test_above_a_ceiling_the_model_goes_back(condition: Any, reason: StopReason) -> None:
    """The step that led above it is taken back: the weights are those of the last step below."""
    rule = (
        HAMUQ(0.1, radius=FixedRadius(0.1))
        if reason is StopReason.FORGET_CEILING
        else HAMUQ(3.0, radius=FixedRadius(1))
    )
    module, history = build(Base), History()
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=40), rule, stop_on=[condition])
    fit(module, history, hamu, max_epochs=40, loader=DataLoader(make_data(), batch_size=96), log_every_n_steps=1)
    assert hamu.stop_reason is reason and "ceiling" in (hamu.stop_message or "")
    assert hamu.combined_steps == len(history.weights) - 1 >= 1  # the step above the ceiling was not followed by one
    before = history.weights[-2]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(module.parameters(), history.weights[-1], strict=True))


@pytest.mark.parametrize("every", [1, 2])
def test_a_stop_that_the_trainer_delays_changes_nothing(every: int, caplog: pytest.LogCaptureFixture) -> None:
    """Neither combined steps nor the plain ones between."""
    module, history = build(Base, "momentum"), History()
    hamu = HAMUCallback(
        FORGET, HAMUQ(1e3, radius=FixedRadius(1e-3)), stop_on=["infeasible"], passes=PassOptions(every_n_steps=every)
    )
    with pytest.warns(UserWarning, match="The base optimizer"):
        trainer, _ = fit(module, history, hamu, min_steps=8, max_epochs=4)
    assert trainer.global_step == 8
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), history.weights[0], strict=True))
    assert "Nothing changes until `min_steps`" in caplog.text


@pytest.mark.parametrize(
    ("retain", "forget", "target", "score"),
    [
        (0.7, 5.0, 2.0, -0.2),
        (0.4, 1.0, 2.0, 0.5),
        (0.4, 2.0, 2.0, 1 + 1 / 1.4),
        (0.4, 3.0, None, 0.75),
    ],
)
def test_the_score(retain: float, forget: float, target: float | None, score: float) -> None:
    ceiling = (RetainAbove(0.5), CollateralDamage())
    assert compute_score(signals(retain_loss=retain, forget_loss=forget), ceiling, target) == pytest.approx(score)


def test_model_checkpoint_follows_the_score(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="hamu/score", mode="max", every_n_train_steps=1)
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=40), RULE, stop_on=[RetainAbove(5.0)])
    trainer, _ = fit(build(Base), hamu, checkpoint, enable_checkpointing=True, log_every_n_steps=1, max_epochs=1)
    assert checkpoint.best_model_score == trainer.callback_metrics["hamu/score"] > 0
