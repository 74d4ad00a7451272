"""What every rule has in common: arguments, results, errors, radii; nothing is read on the host."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hamu_lightning.rules import (
    HAMUQ,
    HAMUU,
    Branch,
    Coefficients,
    FineTune,
    FixedRadius,
    LearningRateRadius,
    RelativeRadius,
    Rule,
)
from tests.oracles import draw_vectors, gramian_of
from tests.rules.setups import RADII, ask, every_rule, hamu_rules, kinds

SCALARS = ("forget_improvement", "retain_improvement", "feasible_improvement", "margin")
PER_BLOCK = ("branch", "quota", "radius", "block_feasible")


def steps_of(result: Coefficients, retain: Tensor, forget: Tensor) -> Tensor:
    return result.values[:, :1] * retain + result.values[:, 1:] * forget


# Results ------------------------------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtypes(rule: Rule, dtype: torch.dtype) -> None:
    result = ask(rule, gramian_of(*draw_vectors(0)).to(dtype))
    assert result.values.shape == (6, 2)
    assert result.values.dtype == torch.float64
    for name in PER_BLOCK:
        assert getattr(result, name).shape == (6,), name
    for name in SCALARS:
        assert getattr(result, name).shape == (), name
    assert not result.branch.is_floating_point()
    assert result.block_feasible.dtype == torch.bool


@every_rule
def test_predicted_improvements_are_those_of_the_step(rule: Rule) -> None:
    retain, forget = draw_vectors(1)
    result = ask(rule, gramian_of(retain, forget))
    step = steps_of(result, retain, forget)
    # Sums of 24 products in float64.
    assert result.forget_improvement.item() == pytest.approx((forget * step).sum().item(), rel=1e-12)
    assert result.retain_improvement.item() == pytest.approx(-(retain * step).sum().item(), rel=1e-12)


@every_rule
def test_coefficients_is_pure(rule: Rule) -> None:
    gramian = gramian_of(*draw_vectors(2))
    before = gramian.clone()
    first, second = ask(rule, gramian), ask(rule, gramian)
    assert torch.equal(gramian, before)
    assert torch.equal(first.values, second.values)


@every_rule
def test_no_graph(rule: Rule) -> None:
    """A Gramian with a history does not drag it into the step."""
    gramian = gramian_of(*draw_vectors(2)).requires_grad_()
    assert torch.isfinite(ask(rule, gramian).values).all()


@every_rule
def test_nothing_is_read_on_the_host(rule: Rule) -> None:
    """FakeTensorMode raises at every host read."""
    with FakeTensorMode():
        result = ask(rule, torch.randn(5, 2, 2), torch.ones(5), torch.ones(()))
        assert result.values.shape == (5, 2)
        assert all(getattr(result, name).shape == () for name in SCALARS)
        assert all(getattr(result, name).shape == (5,) for name in PER_BLOCK)


@kinds
def test_nothing_is_read_on_the_host_with_plain_settings(kind: type[HAMUQ] | type[HAMUU]) -> None:
    with FakeTensorMode():
        for on_infeasible in ("best_effort", "skip"):
            rule = kind(0.1, on_infeasible=on_infeasible)
            assert rule.coefficients(torch.randn(5, 2, 2), lr=0.1).margin.shape == ()


# Rules are values ---------------------------------------------------------------------------------------------------


@every_rule
def test_rules_are_frozen_values(rule: Rule) -> None:
    twins = [copy.copy(rule), copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))]
    assert all(twin == rule and hash(twin) == hash(rule) for twin in twins)
    assert repr(rule).startswith(type(rule).__name__ + "(")
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.blocks = "global"


def test_different_rules_differ() -> None:
    rules: list[Rule] = [
        HAMUQ(0.1),
        HAMUQ(0.2),
        HAMUU(0.1),
        HAMUQ(0.1, radius=FixedRadius(0.1)),
        HAMUQ(0.1, allocation="uniform"),
        HAMUQ(0.1, blocks="global"),
        HAMUQ(0.1, on_infeasible="skip"),
        FineTune(),
        FineTune(blocks="layer"),
    ]
    assert len(set(rules)) == len(rules)
    assert HAMUQ(0.1) == HAMUQ(quota=0.1, radius=LearningRateRadius(), allocation="proportional", blocks="tensor")
    assert "0.2" in repr(rules[1])
    assert "FixedRadius(radius=0.1)" in repr(rules[3])


@pytest.mark.parametrize("radius", RADII, ids=repr)
def test_radii_are_frozen_values(radius: LearningRateRadius | FixedRadius | RelativeRadius) -> None:
    assert radius == pickle.loads(pickle.dumps(radius))
    assert hash(radius) == hash(copy.deepcopy(radius))
    for field in dataclasses.fields(radius):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(radius, field.name, 1.0)


def test_results_are_frozen() -> None:
    result = ask(HAMUQ(0.1), gramian_of(*draw_vectors(0)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.values = torch.zeros(6, 2)  # type: ignore[misc]


def test_branch_names() -> None:
    names = "DIRECT RECTIFIED COLLINEAR NO_RETAIN_SIGNAL NO_FORGET_SIGNAL NO_RADIUS INFEASIBLE NOT_FINITE"
    assert [branch.name for branch in Branch] == names.split()


# Learning rates and radii -------------------------------------------------------------------------------------------


@every_rule
def test_learning_rates_per_block(rule: Rule) -> None:
    gramian = gramian_of(*draw_vectors(3))
    one, many = ask(rule, gramian, 0.1), ask(rule, gramian, torch.full((6,), 0.1, dtype=torch.float64))
    assert torch.equal(one.values, many.values)


@kinds
def test_learning_rate_radius(kind: type[HAMUQ] | type[HAMUU]) -> None:
    retain, forget = draw_vectors(3)
    lr = torch.linspace(0.1, 0.6, 6, dtype=torch.float64)
    result = kind(0.05).coefficients(gramian_of(retain, forget), lr=lr)
    own = retain if kind is HAMUQ else forget
    torch.testing.assert_close(result.radius, lr * own.norm(dim=1), rtol=1e-14, atol=0)


@kinds
def test_the_direct_step_of_the_learning_rate_radius_is_plain_sgd(kind: type[HAMUQ] | type[HAMUU]) -> None:
    retain, forget = draw_vectors(3)
    quota = torch.tensor(-math.inf)
    result = kind(0.05).coefficients(gramian_of(retain, forget), lr=0.3, quota=quota)
    expected = -0.3 * retain if kind is HAMUQ else 0.3 * forget
    torch.testing.assert_close(steps_of(result, retain, forget), expected, rtol=1e-14, atol=0)  # a root, a quotient


@kinds
@pytest.mark.parametrize("floor", [0.0, 0.1, 2.0])
def test_relative_radius(kind: type[HAMUQ] | type[HAMUU], floor: float) -> None:
    norms, sizes = [3.0, 0.0, 0.5, 20.0, 1e-3, 1.0], [4, 10, 100, 1000, 1, 7]
    rms = math.sqrt(sum(norm**2 for norm in norms) / sum(sizes))
    expected = [0.02 * max(norm, floor * rms * math.sqrt(n)) for norm, n in zip(norms, sizes, strict=True)]
    for lr in (0.1, 7.0):  # the learning rate is of no account
        rule = kind(0.05, radius=RelativeRadius(0.02, floor=floor))
        result = rule.coefficients(
            gramian_of(*draw_vectors(3)),
            lr=lr,
            weight_norms=torch.tensor(norms, dtype=torch.float64),
            sizes=torch.tensor(sizes),
        )
        np.testing.assert_allclose(result.radius.numpy(), expected, rtol=1e-14)


@hamu_rules
def test_blocks_without_learning_rate_rest(rule: HAMUQ | HAMUU) -> None:
    """Warm-up: they do not move, get no quota and do not stop the others."""
    gramian = gramian_of(*draw_vectors(4))
    lr = torch.tensor([0.1, 0.1, 0.0, 0.1, 0.0, 0.1], dtype=torch.float64)
    result = ask(rule, gramian, lr)
    assert (result.values[lr == 0] == 0).all()
    assert (result.quota[lr == 0] == 0).all()
    assert (result.branch[lr == 0] == Branch.NO_RADIUS).all()
    served = result.forget_improvement if isinstance(rule, HAMUQ) else result.retain_improvement
    assert served >= rule.quota * (1 - 1e-12)  # rounding


@every_rule
def test_no_learning_rate_at_all(rule: Rule) -> None:
    result = ask(rule, gramian_of(*draw_vectors(4)), 0.0)
    assert (result.values == 0).all()
    assert result.forget_improvement == result.retain_improvement == 0


def test_fine_tuning_never_looks_at_the_forget_gradient() -> None:
    for bad in (math.nan, math.inf, 0.0, 1e30):
        gramian = gramian_of(*draw_vectors(6))
        gramian[:, 1, :] = gramian[:, :, 1] = bad
        result = FineTune().coefficients(gramian, lr=0.1)
        assert result.values.tolist() == [[-0.1, 0.0]] * 6
        lr = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
        values = FineTune().coefficients(gramian, lr=lr).values
        assert torch.equal(values[:, 0], -lr)
        assert torch.equal(values[:, 1], torch.zeros_like(lr))


@pytest.mark.parametrize("allocation", ["proportional", "optimal"])
def test_a_quota_is_served_up_to_rounding(allocation: Literal["proportional", "optimal"]) -> None:
    """Twenty blocks of float32 gradients at 0.3 and 1.01 of the capacity; HAMU-U likewise."""
    grads = torch.randn(20, 2, 30, generator=torch.Generator().manual_seed(0))
    gramian = grads @ grads.mT
    for rule, row in ((HAMUQ, 1), (HAMUU, 0)):
        capacity = float(0.1 * gramian[:, row, row].sqrt().sum())
        for share, is_served in ((0.3, True), (1.01, False)):
            step = rule(share * capacity, radius=FixedRadius(0.1), allocation=allocation).coefficients(gramian, lr=0.1)
            assert bool(step.is_served) == is_served
            assert step.conflict() == ()
