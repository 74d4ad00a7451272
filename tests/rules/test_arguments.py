"""Arguments that a rule refuses, and numbers that stop it."""

from __future__ import annotations

import math

import pytest
import torch

from hamu_lightning.errors import HAMUError, HAMUValueError
from hamu_lightning.rules import (
    HAMUQ,
    HAMUU,
    Branch,
    Coefficients,
    FineTune,
    FixedRadius,
    RelativeRadius,
    Rule,
)
from tests.oracles import draw_vectors, gramian_of
from tests.rules.setups import ALLOCATIONS, RADII, ask, hamu_rules, kinds
from tests.rules.test_baselines import RULES as BASELINES

# Wrong use ----------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("quota", [-1e-9, -1.0, math.nan, -math.inf])
def test_bad_quota(kind: type[HAMUQ] | type[HAMUU], quota: float) -> None:
    with pytest.raises(HAMUValueError, match=f"Expected `quota` to be .* but got {quota}"):
        kind(quota)


@kinds
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allocation": "fair"}, "Expected `allocation` to be .*'proportional'.*'optimal'.* but got 'fair'"),
        ({"on_infeasible": "stop"}, "Expected `on_infeasible` to be .*'best_effort'.*'skip'.* but got 'stop'"),
        ({"blocks": "row"}, "Expected `blocks` to be .*'tensor'.*'layer'.*'global'.* but got 'row'"),
        ({"radius": 0.1}, "Expected `radius` to be .* but got 0.1"),
    ],
)
def test_bad_settings(kind: type[HAMUQ] | type[HAMUU], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        kind(0.1, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf])
def test_bad_radii(value: float) -> None:
    with pytest.raises(HAMUValueError, match=f"Expected `radius` to be positive.* but got {value}"):
        FixedRadius(value)
    with pytest.raises(HAMUValueError, match=f"Expected `fraction` to be positive.* but got {value}"):
        RelativeRadius(value)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_floor(value: float) -> None:
    with pytest.raises(HAMUValueError, match=f"Expected `floor` to be .* but got {value}"):
        RelativeRadius(0.1, floor=value)


def test_errors_are_ours_and_value_errors() -> None:
    assert issubclass(HAMUValueError, HAMUError)
    with pytest.raises(ValueError, match="Expected `radius`"):
        FixedRadius(-1.0)


@kinds
@pytest.mark.parametrize("missing", ["weight_norms", "sizes"])
def test_the_relative_radius_needs_the_weights(kind: type[HAMUQ] | type[HAMUU], missing: str) -> None:
    arguments = {"weight_norms": torch.ones(3), "sizes": torch.ones(3)}
    del arguments[missing]
    with pytest.raises(HAMUValueError, match="weight_norms.*sizes"):
        kind(0.1, radius=RelativeRadius(0.1)).coefficients(torch.eye(2).expand(3, 2, 2), lr=0.1, **arguments)


@pytest.mark.parametrize("rule", [HAMUQ(0.1), HAMUU(0.1), FineTune(), *BASELINES], ids=repr)
@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (3, 3, 3), (3, 2, 3), (1, 3, 2, 2), ()])
def test_bad_shape(rule: Rule, shape: tuple[int, ...]) -> None:
    with pytest.raises(HAMUValueError, match=r"Expected `gramian` to have shape \[B, 2, 2\], but got"):
        rule.coefficients(torch.ones(shape), lr=0.1)


@pytest.mark.parametrize("rule", [HAMUQ(0.1), HAMUU(0.1), FineTune(), *BASELINES], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_bad_dtype(rule: Rule, dtype: torch.dtype) -> None:
    """Half precision sums overflow and underflow; whoever has such a Gramian should hear of it."""
    with pytest.raises(HAMUValueError, match=f"Expected `gramian` to be float32 or float64, but got {dtype}"):
        rule.coefficients(torch.ones(3, 2, 2).to(dtype), lr=0.1)


# Not finite ---------------------------------------------------------------------------------------------------------


@hamu_rules
def test_one_bad_entry_stops_every_block(rule: HAMUQ | HAMUU) -> None:
    """In the block of zeros, the collinear one or an ordinary one."""
    for bad in (math.nan, math.inf, -math.inf):
        for block, entries in ((0, [(0, 0)]), (1, [(1, 1)]), (5, [(0, 1), (1, 0)]), (0, [(1, 1)]), (5, [(0, 0)])):
            gramian = gramian_of(*draw_vectors(5))
            for i, j in entries:
                gramian[block, i, j] = bad
            assert_stopped(ask(rule, gramian))


def assert_stopped(result: Coefficients) -> None:
    assert (result.values == 0).all()
    assert (result.branch == Branch.NOT_FINITE).all()
    assert not result.block_feasible.any()
    assert result.forget_improvement == result.retain_improvement == 0


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_learning_rates_and_weights_stop_every_block(kind: type[HAMUQ] | type[HAMUU], bad: float) -> None:
    gramian = gramian_of(*draw_vectors(5))
    lr, norms = torch.ones(6), torch.ones(6)
    lr[3] = norms[3] = bad
    for allocation in ALLOCATIONS:
        assert_stopped(kind(0.1, allocation=allocation).coefficients(gramian, lr=lr))  # type: ignore[arg-type]
        rule = kind(0.1, allocation=allocation, radius=RelativeRadius(0.1))  # type: ignore[arg-type]
        assert_stopped(rule.coefficients(gramian, lr=0.1, weight_norms=norms, sizes=torch.ones(6)))


@kinds
def test_a_quota_that_is_not_a_number_stops_every_block(kind: type[HAMUQ] | type[HAMUU]) -> None:
    """A quota derived from a loss that is NaN must not become a step at full radius."""
    for radius in RADII:
        for allocation in ALLOCATIONS:
            rule = kind(0.1, radius=radius, allocation=allocation)  # type: ignore[arg-type]
            assert_stopped(ask(rule, gramian_of(*draw_vectors(5)), quota=torch.tensor(math.nan)))
