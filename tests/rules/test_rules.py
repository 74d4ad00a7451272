"""What holds for every rule: settings, shapes, scale, what is not finite, no host reads."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import compute_gramian
from hamu_lightning.rules import (
    HAMUQ,
    HAMUU,
    Branch,
    FineTune,
    FixedRadius,
    LearningRateRadius,
    Radius,
    RelativeRadius,
    Rule,
)

ALLOCATIONS = ("proportional", "uniform", "softmax", "optimal")
RADII: tuple[Radius, ...] = (LearningRateRadius(), FixedRadius(0.1), RelativeRadius(0.01))
RULES = [
    *(kind(0.01, radius=r, allocation=a) for kind in (HAMUQ, HAMUU) for r in RADII for a in ALLOCATIONS),  # type: ignore
    FineTune(),
]


def random_gramian(blocks: int = 5, dimension: int = 4, seed: int = 0) -> Tensor:
    """The first block is zero, the second collinear."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(blocks, 2, dimension, generator=generator, dtype=torch.float64)
    rows[0] = 0
    rows[1, 1] = 2 * rows[1, 0]
    return rows @ rows.mT


def ask(rule: Rule, gramian: Tensor, lr: float | Tensor = 0.1) -> Tensor:
    n = gramian.shape[0]
    return rule.coefficients(gramian, lr=lr, weight_norms=torch.ones(n), sizes=torch.full((n,), 4)).values


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_nothing_is_read_on_the_host(rule: Rule) -> None:
    with FakeTensorMode():
        step = rule.coefficients(
            torch.randn(3, 2, 2), lr=torch.ones(3), weight_norms=torch.ones(3), sizes=torch.ones(3)
        )
        assert step.values.shape == (3, 2)
        assert step.margin.shape == step.retain_improvement.shape == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", RULES[:-1], ids=repr)
def test_one_bad_number_stops_every_block(rule: Rule, bad: float) -> None:
    gramian = random_gramian()
    gramian[3, 0, 1] = bad
    values = ask(rule, gramian)
    assert (values == 0).all()
    n = gramian.shape[0]
    step = rule.coefficients(gramian, lr=0.1, weight_norms=torch.ones(n), sizes=torch.full((n,), 4))
    assert (step.branch == Branch.NOT_FINITE).all()
    assert not step.block_feasible.any()
    assert step.forget_improvement == 0


def test_fine_tuning_ignores_the_forget_gradient() -> None:
    gramian = random_gramian()
    gramian[:, 1] = gramian[:, :, 1] = math.nan
    assert ask(FineTune(), gramian).tolist() == [[-0.1, 0.0]] * 5


@pytest.mark.parametrize("rule", RULES[:-1], ids=repr)
def test_zero_learning_rate_rests_and_gets_no_quota(rule: Rule) -> None:
    lr = torch.tensor([0.1, 0.0, 0.1, 0.0, 0.1], dtype=torch.float64)
    n = lr.numel()
    step = rule.coefficients(random_gramian(), lr=lr, weight_norms=torch.ones(n), sizes=torch.full((n,), 4))
    assert (step.values[lr == 0] == 0).all()
    assert (step.quota[lr == 0] == 0).all()
    assert (step.branch[lr == 0] == Branch.NO_RADIUS).all()
    assert step.values[2].abs().sum() > 0
    assert (ask(rule, random_gramian(), 0.0) == 0).all()


@settings(max_examples=50, deadline=None)
@given(
    scale=st.floats(-10, 10),
    seed=st.integers(0, 1000),
    allocation=st.sampled_from(("proportional", "uniform", "optimal")),
)
def test_unit_of_the_loss_does_not_matter(scale: float, seed: int, allocation: str) -> None:
    """Gradients and quota in another unit: the same step (PITFALLS 4)."""
    factor = 10.0**scale
    gramian = random_gramian(seed=seed)
    a = HAMUQ(0.05, radius=FixedRadius(0.1), allocation=allocation)  # type: ignore[arg-type]
    b = HAMUQ(0.05 * factor, radius=FixedRadius(0.1), allocation=allocation)  # type: ignore[arg-type]
    # 1e-7: the joint search ends at a bracket of 1e-14, and a collinear block jumps inside it.
    torch.testing.assert_close(ask(b, gramian * factor**2) * factor, ask(a, gramian), rtol=1e-7, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), allocation=st.sampled_from(ALLOCATIONS))
def test_order_of_the_blocks_does_not_matter(seed: int, allocation: str) -> None:
    gramian, order = random_gramian(seed=seed), torch.tensor([3, 1, 4, 0, 2])
    rule = HAMUQ(0.05, radius=FixedRadius(0.1), allocation=allocation)  # type: ignore[arg-type]
    torch.testing.assert_close(ask(rule, gramian[order]), ask(rule, gramian)[order], rtol=1e-7, atol=1e-7)


def test_global_block_is_one_problem() -> None:
    """PITFALLS 1: the step of all tensors together keeps one radius and meets one quota."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        retain = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (3, 1, 20)]
        forget = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (3, 1, 20)]
        gramian = compute_gramian(retain, forget, blocks=[0, 0, 0])
        c_r, c_f = HAMUQ(0.2, radius=FixedRadius(0.1)).coefficients(gramian, lr=1.0).values[0]
        step = [c_r * r + c_f * f for r, f in zip(retain, forget, strict=True)]
        assert torch.cat(step).norm() <= 0.1 * (1 + 1e-9)
        assert torch.cat(step) @ torch.cat(forget) >= 0.2 - 1e-12


def test_float32_gramian_of_equal_gradients_gives_no_noise_step() -> None:
    """PITFALLS 3: rounding in a float32 Gramian must not become a step at full radius."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(500, 1000, generator=generator)
    noisy = gradient.square().sum(1)
    gramian = torch.stack((noisy, noisy * (1 - 1e-7), noisy * (1 - 1e-7), noisy), 1).view(-1, 2, 2)
    step = HAMUQ(0.5, radius=FixedRadius(1.0)).coefficients(gramian, lr=1.0)
    assert (step.branch == Branch.COLLINEAR).all()
    assert (step.values[:, 0] == 0).all()


@pytest.mark.parametrize("quota", [-1.0, math.nan, math.inf])
def test_bad_quota(quota: float) -> None:
    with pytest.raises(HAMUValueError, match="Expected `quota` to be a finite number, not negative"):
        HAMUQ(quota)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allocation": "fair"}, "Expected `allocation` to be one of 'proportional'"),
        ({"on_infeasible": "stop"}, "Expected `on_infeasible` to be one of 'best_effort'"),
        ({"blocks": "row"}, "Expected `blocks` to be 'tensor', 'layer'"),
        ({"radius": 0.1}, r"Expected `radius` to be a radius such as FixedRadius\(0.1\)"),
    ],
)
def test_bad_settings(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        HAMUQ(0.1, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bad_radii(value: float) -> None:
    with pytest.raises(HAMUValueError, match="Expected `radius` to be positive, but got"):
        FixedRadius(value)
    with pytest.raises(HAMUValueError, match="Expected `fraction` to be positive, but got"):
        RelativeRadius(value)
    if value != 0.0:
        with pytest.raises(HAMUValueError, match="Expected `floor` to be a share"):
            RelativeRadius(0.1, floor=value)


def test_bad_gramians() -> None:
    with pytest.raises(HAMUValueError, match=r"Expected `gramian` to have shape \[B, 2, 2\], but got \[2, 2\]"):
        HAMUQ(0.1).coefficients(torch.eye(2), lr=0.1)
    with pytest.raises(HAMUValueError, match="Expected `gramian` to be float32 or float64, but got torch.float16"):
        FineTune().coefficients(torch.eye(2).half().expand(3, 2, 2), lr=0.1)
    with pytest.raises(HAMUValueError, match="Expected `weight_norms` and `sizes`"):
        HAMUQ(0.1, radius=RelativeRadius(0.1)).coefficients(torch.eye(2).expand(3, 2, 2), lr=0.1)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rules_are_values(rule: Rule) -> None:
    assert copy.deepcopy(rule) == pickle.loads(pickle.dumps(rule)) == rule
    assert hash(copy.deepcopy(rule)) == hash(rule)
    assert type(rule).__name__ in repr(rule)
    assert HAMUQ(0.1) != HAMUU(0.1)
