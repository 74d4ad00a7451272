"""Batch losses only hint when to measure: they are not mixed with levels."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.callbacks.goals._score import compute_score
from hamu_lightning.callbacks.goals._signals import Signals
from hamu_lightning.callbacks.goals._trail import Trail
from hamu_lightning.objectives import evaluating
from hamu_lightning.rules import FixedRadius, TargetQuota
from tests.callbacks.goals.test_levels import Dropped
from tests.callbacks.goals.test_targets import FORGET, loss_on, trained
from tests.callbacks.goals.test_whole_set import Once
from tests.callbacks.modules import fit


def test_the_rise_of_batch_losses_counts_and_not_their_height() -> None:
    trail = Trail()
    assert trail.estimate is None
    trail.mark(torch.tensor(0.1))
    for loss in (2.0, math.nan, 2.0):
        trail.add(torch.tensor(loss))
    assert float(trail.estimate) == pytest.approx(0.1)  # type: ignore[arg-type]
    for _ in range(50):
        trail.add(torch.tensor(2.5))
    assert float(trail.estimate) == pytest.approx(0.6, abs=1e-3)  # type: ignore[arg-type]
    other = Trail()
    other.load_state_dict(trail.state_dict())
    other.mark(torch.tensor(0.3))
    other.add(torch.tensor(2.5))
    assert float(other.estimate) == pytest.approx(0.3, abs=1e-3)  # type: ignore[arg-type]


def level_after(forget: Any, steps: int) -> tuple[float, float, float]:
    """The level that is followed, where it started, and the loss of training batches at the end."""
    module = trained(Dropped)
    with evaluating(module):
        before = loss_on(module, FORGET)
    hamu = HAMUCallback(forget, HAMUQ(TargetQuota(50.0), radius=FixedRadius(1e-6)), verify=False)
    trainer, _ = fit(copy.deepcopy(module), hamu, max_epochs=-1, max_steps=steps)
    aim = hamu.state_dict()["optimizer"]["aims"]["forget"]
    return float(aim["level"]), before, float(trainer.callback_metrics["forget/loss"])


@pytest.mark.filterwarnings(
    "ignore:The fit has ended before the target", "ignore:.*judged by the mean loss over a whole"
)
@pytest.mark.parametrize("source", ["measured", "stream"])
def test_a_level_does_not_follow_the_losses_of_training_batches(source: str) -> None:
    """Under dropout these are much higher; the weights hardly move."""
    forget = DataLoader(FORGET, batch_size=40) if source == "measured" else DataLoader(Once(), batch_size=40)
    level, before, batches = level_after(forget, 6)
    assert batches > 1.5 * before
    assert level == pytest.approx(before, rel=1e-3)  # promises of steps of 1e-6


def test_the_score_takes_the_level() -> None:
    signals = Signals(0.1, 1.0, 0.1, 0.5, 3.0, 1.0, 1.0, "forget")
    assert compute_score(signals, (), 2.0) > 1
    assert compute_score(signals, (), 2.0, level=1.0) == 0.5
