"""The numbers by which it is decided whether to go on."""

from __future__ import annotations

import math

import pytest
import torch

from hamu_lightning.callbacks import Infeasible, NotFinite
from hamu_lightning.callbacks.goals._conditions import CollateralDamage
from hamu_lightning.callbacks.goals._signals import NUMBERS, pack_signals
from hamu_lightning.optim import StepReport
from hamu_lightning.rules import HAMUQ


@pytest.mark.parametrize("needs_bound", [True, False])
def test_the_bound_is_searched_for_where_it_is_needed(needs_bound: bool) -> None:
    lr = torch.full((2,), 0.1, dtype=torch.float64)
    step = HAMUQ(1e-3).coefficients(torch.eye(2, dtype=torch.float64).expand(2, 2, 2), lr=lr)
    report = StepReport(step.gramian, step, lr, ("a", "b"))
    packed = pack_signals(report, torch.ones(()), torch.ones(()), needs_bound=needs_bound)
    numbers = dict(zip(NUMBERS, packed.tolist(), strict=True))
    assert ("feasible_improvement" in vars(step)) is needs_bound
    assert numbers["feasible"] == (pytest.approx(0.2) if needs_bound else math.inf)


def test_who_needs_it() -> None:
    assert CollateralDamage.needs_bound
    assert not Infeasible.needs_bound
    assert not NotFinite.needs_bound
