"""The other methods at their limits: gradients that vanish, are parallel or change their scale."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.rules import (
    GRU,
    MGDA,
    Branch,
    CombinationRule,
    GradAscent,
    GradDiff,
    MUNBa,
    NGDiff,
    PCGrad,
)
from tests.rules.test_baselines import RULES, ask, every_rule, situations

VECTOR = torch.tensor([3.0, 4.0, 12.0], dtype=torch.float64)  # its length is 13
ZERO = torch.zeros(3, dtype=torch.float64)
UNIT = VECTOR / 13

LIMITS: list[tuple[CombinationRule, Tensor, Tensor, Tensor, Tensor]] = [
    # rule, the step over -lr without a forget gradient, without a retain gradient, for g_f = g_r, for g_f = -g_r
    (GradAscent(), ZERO, -VECTOR, -VECTOR, VECTOR),
    (GradDiff(0.3), VECTOR, -0.3 * VECTOR, 0.7 * VECTOR, 1.3 * VECTOR),
    (PCGrad(), VECTOR, -VECTOR, ZERO, 2 * VECTOR),
    (GRU(), ZERO, -VECTOR, ZERO, VECTOR),
    (NGDiff(), UNIT, -UNIT, ZERO, 2 * UNIT),
    (MGDA(), ZERO, ZERO, ZERO, VECTOR),
    (MUNBa(), ZERO, ZERO, ZERO, math.sqrt(2) * UNIT),
]


@pytest.mark.parametrize(
    ("rule", "no_forget", "no_retain", "same", "opposite"), LIMITS, ids=[repr(x[0]) for x in LIMITS]
)
def test_limits(rule: CombinationRule, no_forget: Tensor, no_retain: Tensor, same: Tensor, opposite: Tensor) -> None:
    cases = [(VECTOR, ZERO, no_forget), (ZERO, VECTOR, no_retain), (VECTOR, VECTOR, same), (VECTOR, -VECTOR, opposite)]
    for retain, forget, expected in [*cases, (ZERO, ZERO, ZERO)]:
        step, result = ask(rule, retain, forget)
        torch.testing.assert_close(step, -0.1 * expected, rtol=1e-14, atol=1e-14)
        assert result.branch.tolist() == [Branch.DIRECT]


def test_opposite_gradients_of_different_length() -> None:
    """One bit of rounding in the Gramian must not become a long step along nothing."""
    for scale in (1.0, 1 / 3, 7.1, 1e-7):
        for rule in (PCGrad(), NGDiff(), MGDA(), MUNBa()):
            step, _ = ask(rule, VECTOR, scale * VECTOR)
            assert step.norm() < 1e-12 * VECTOR.norm(), (rule, scale)


SCALES: list[tuple[CombinationRule, float, float]] = [
    # rule, the powers of the scales of the retain and of the forget loss that the step grows with
    (GradAscent(), 0, 1),
    (GRU(), 0, 1),
    (NGDiff(), 0, 0),
    (MUNBa(), 0, 0),
]


@pytest.mark.parametrize(("rule", "retain_power", "forget_power"), SCALES, ids=[repr(x[0]) for x in SCALES])
@situations
def test_scale_of_each_loss(rule: CombinationRule, retain_power: float, forget_power: float, conflict: bool) -> None:
    retain, forget = VECTOR, torch.tensor([1.0, -2.0, 3.0 if conflict else -3.0], dtype=torch.float64)
    step, _ = ask(rule, retain, forget)
    for a in (1e-60, 1e-5, 1.0, 1e5, 1e60):
        for b in (1e-60, 1e-5, 1.0, 1e5, 1e60):
            scaled, _ = ask(rule, a * retain, b * forget)
            torch.testing.assert_close(scaled / (a**retain_power * b**forget_power), step, rtol=1e-12, atol=0)


@every_rule
@situations
def test_scale_of_both_losses(rule: CombinationRule, conflict: bool) -> None:
    """The step grows with the loss, or does not change at all."""
    retain, forget = VECTOR, torch.tensor([1.0, -2.0, 3.0 if conflict else -3.0], dtype=torch.float64)
    step, _ = ask(rule, retain, forget)
    power = 0 if isinstance(rule, NGDiff | MUNBa) else 1
    for scale in (1e-70, 1e-5, 1e5, 1e70):
        scaled, result = ask(rule, scale * retain, scale * forget)
        torch.testing.assert_close(scaled / scale**power, step, rtol=1e-12, atol=0)
        assert result.radius.isfinite().all()


@every_rule
def test_sums_that_overflow_stop_the_step(rule: CombinationRule) -> None:
    """Each block's numbers are finite, those of the whole gradient are not."""
    result = rule.coefficients(torch.full((4, 2, 2), 1e308, dtype=torch.float64), lr=1e-9)
    assert (result.branch == Branch.NOT_FINITE).all()


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_bad_weight(weight: float) -> None:
    with pytest.raises(HAMUValueError, match=f"Expected `weight` to be positive, but got {weight}"):
        GradDiff(weight)


@pytest.mark.parametrize("method", [type(rule) for rule in RULES])
def test_bad_blocks(method: type[CombinationRule]) -> None:
    with pytest.raises(HAMUValueError, match="Expected `blocks` to be .* but got 'row'"):
        method(blocks="row")  # type: ignore[arg-type]
