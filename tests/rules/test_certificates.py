"""The most that a step can give without harm to the other objective, over all blocks (docs/method.md#certificates)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hamu_lightning.rules import HAMUQ, HAMUU, Branch, Coefficients, FixedRadius, RelativeRadius
from tests.oracles import JointProblem, draw_joint_problem, solve_certificate

QUOTA = 1e-2
rules = pytest.mark.parametrize("kind", [HAMUQ, HAMUU])


def solve(
    problem: JointProblem, kind: type[HAMUQ] | type[HAMUU], quota: float = QUOTA, allocation: str = "proportional"
) -> Coefficients:
    """The rule's answer for gradients in the order retain, forget; the radii are those of the problem."""
    rule = kind(quota, radius=RelativeRadius(1.0, floor=0.0), allocation=allocation)  # type: ignore[arg-type]
    sizes = torch.tensor([g.size for g in problem.retain])
    norms = torch.from_numpy(problem.radii)
    return rule.coefficients(torch.from_numpy(problem.gramian), lr=0.1, weight_norms=norms, sizes=sizes)


def mirrored(problem: JointProblem) -> JointProblem:
    """Every block antiparallel: what raises the forget loss lowers the retain loss."""
    rng = np.random.default_rng(0)
    forget = tuple(-r * rng.uniform(0.1, 2) for r in problem.retain)
    return JointProblem(problem.retain, forget, problem.radii)


def assert_certificate(result: Coefficients, expected: float, reach: float, quota: float = QUOTA) -> None:
    # The accuracy that is promised, of the most that the radii allow: F itself can be zero.
    assert result.feasible_improvement.item() == pytest.approx(expected, abs=1e-6 * reach, rel=0)
    assert result.margin.item() == pytest.approx(expected - quota, abs=1e-6 * reach + 1e-12 * quota, rel=0)


@pytest.mark.parametrize(
    ("kind", "seed"), [*((HAMUQ, seed) for seed in range(400)), *((HAMUU, seed) for seed in range(400, 500))]
)
def test_against_a_cone_solver(kind: type[HAMUQ] | type[HAMUU], seed: int) -> None:
    problem = draw_joint_problem(seed)
    asked = problem if kind is HAMUQ else problem.exchanged()
    assert_certificate(solve(problem, kind), solve_certificate(asked), asked.forget_reach)


@rules
@pytest.mark.parametrize("seed", range(10))
def test_antiparallel_gradients(kind: type[HAMUQ] | type[HAMUU], seed: int) -> None:
    """At 180 degrees both objectives improve most, and F is the whole capacity."""
    problem = mirrored(draw_joint_problem(2 * seed, blocks=3 + seed))  # even seeds: no block without forget gradient
    asked = problem if kind is HAMUQ else problem.exchanged()
    assert_certificate(solve(problem, kind), asked.forget_reach, asked.forget_reach)
    assert solve_certificate(asked) == pytest.approx(asked.forget_reach, rel=1e-8)  # the cone solver's tolerance


@rules
def test_no_stop_while_both_objectives_can_improve(kind: type[HAMUQ] | type[HAMUU]) -> None:
    """Cosines in (-1, -0.5) and a quota below the capacity always leave a margin."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        angles = rng.uniform(2 * np.pi / 3, np.pi, 4)
        sizes = 10 ** rng.uniform(-3, 3, (4, 2))
        retain = tuple(size * np.array([1.0, 0.0]) for size in sizes[:, 0])
        forget = tuple(s * np.array([np.cos(a), np.sin(a)]) for s, a in zip(sizes[:, 1], angles, strict=True))
        problem = JointProblem(retain, forget, 10 ** rng.uniform(-2, 0, 4))
        reach = (problem if kind is HAMUQ else problem.exchanged()).forget_reach
        assert solve(problem, kind, quota=0.999 * reach).margin > 0


@rules
def test_parallel_gradients_leave_nothing(kind: type[HAMUQ] | type[HAMUU]) -> None:
    """Blocks with the same price f = k r: no step forgets without harm, F = 0."""
    problem = draw_joint_problem(0, blocks=5)
    problem = JointProblem(problem.retain, tuple(0.7 * r for r in problem.retain), problem.radii)
    asked = problem if kind is HAMUQ else problem.exchanged()
    assert_certificate(solve(problem, kind), 0.0, asked.forget_reach)


@rules
def test_parallel_blocks_of_different_price_trade_with_each_other(kind: type[HAMUQ] | type[HAMUU]) -> None:
    """The sum of the one-block bounds is zero, the joint bound is not."""
    problem = draw_joint_problem(0, blocks=5)
    forget = tuple(k * r for k, r in zip((0.1, 0.5, 1.0, 2.0, 9.0), problem.retain, strict=True))
    problem = JointProblem(problem.retain, forget, problem.radii)
    asked = problem if kind is HAMUQ else problem.exchanged()
    result = solve(problem, kind)
    assert_certificate(result, solve_certificate(asked), asked.forget_reach)
    assert result.feasible_improvement > 0.1 * asked.forget_reach


@rules
def test_nothing_to_harm(kind: type[HAMUQ] | type[HAMUU]) -> None:
    """All rr = 0: F is the capacity. All ff = 0: F is zero."""
    problem = draw_joint_problem(0, blocks=4)
    zeros = tuple(np.zeros_like(r) for r in problem.retain)
    for free, constrained in ((zeros, problem.forget), (problem.retain, zeros), (zeros, zeros)):
        one = JointProblem(free, constrained, problem.radii)
        given = one if kind is HAMUQ else one.exchanged()
        # sum of four roots
        expected = pytest.approx(one.forget_reach, rel=1e-14)
        assert solve(given, kind).feasible_improvement.item() == expected


@rules
def test_zero_collinear_and_not_finite_blocks(kind: type[HAMUQ] | type[HAMUU]) -> None:
    problem = draw_joint_problem(0, blocks=5)  # the second block is collinear
    retain, forget = list(problem.retain), list(problem.forget)
    retain[2] = forget[2] = np.zeros_like(retain[2])
    problem = JointProblem(tuple(retain), tuple(forget), problem.radii)
    asked = problem if kind is HAMUQ else problem.exchanged()
    assert_certificate(solve(problem, kind), solve_certificate(asked), asked.forget_reach)
    forget[3] = forget[3] * np.nan
    broken = JointProblem(tuple(retain), tuple(forget), problem.radii)
    result = solve(broken, kind)
    assert (result.branch == Branch.NOT_FINITE).all()


@rules
@pytest.mark.parametrize("cosine", [-0.9, -0.1, 0.0, 0.1, 0.9, 0.99999])
def test_equal_blocks_have_the_bound_of_one(kind: type[HAMUQ] | type[HAMUU], cosine: float) -> None:
    """R sqrt(ff), or R sqrt(ff - rf^2/rr) where rf > 0: with the sign of rf, which the authors' code leaves out."""
    rr, ff, radius, blocks = 4.0, 9.0, 0.3, 3
    rf = cosine * (rr * ff) ** 0.5
    gramian = torch.tensor([[rr, rf], [rf, ff]], dtype=torch.float64).expand(blocks, 2, 2)
    own, other = (ff, rr) if kind is HAMUQ else (rr, ff)
    expected = blocks * radius * (own - (rf**2 / other if rf > 0 else 0.0)) ** 0.5
    result = kind(QUOTA, radius=FixedRadius(radius)).coefficients(gramian, lr=0.1)
    # 1 - cos^2 cancels to 2e-5 in the last case: ten digits are left of the root, of which we ask nine.
    assert result.feasible_improvement.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_is_sharp_for_the_optimal_allocation(seed: int) -> None:
    """A quota just below F costs retain nothing, one just above costs something under every allocation."""
    problem = draw_joint_problem(seed, blocks=3 + seed % 9)
    bound = solve(problem, HAMUQ).feasible_improvement.item()
    step = 1e-4 * problem.forget_reach
    if step < bound:
        harmless = solve(problem, HAMUQ, quota=bound - step, allocation="optimal")
        assert harmless.margin > 0
        # 1e-6 is the accuracy of the optimal allocation.
        assert harmless.retain_improvement >= -1e-6 * problem.retain_reach
    if bound + step < problem.forget_reach:
        for allocation in ("proportional", "uniform", "softmax", "optimal"):
            harmful = solve(problem, HAMUQ, quota=bound + step, allocation=allocation)
            assert harmful.margin < 0
            assert harmful.retain_improvement < 0, allocation


@rules
@pytest.mark.parametrize("allocation", ["proportional", "uniform", "softmax", "optimal"])
@pytest.mark.parametrize("cosine", [-0.9, 0.3])
def test_margin_is_the_bound_minus_the_total_quota(
    kind: type[HAMUQ] | type[HAMUU], allocation: str, cosine: float
) -> None:
    """Also where the step itself gives more than is asked: the margin is about the quota, not about the step."""
    gramian = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64).expand(3, 2, 2)
    rule = kind(0.01, radius=FixedRadius(0.1), allocation=allocation)  # type: ignore[arg-type]
    result = rule.coefficients(gramian, lr=0.1)
    expected = 0.3 * (1.0 if cosine < 0 else (1 - cosine**2) ** 0.5)
    assert result.feasible_improvement.item() == pytest.approx(expected, rel=1e-9)
    assert result.margin.item() == pytest.approx(expected - 0.01, rel=1e-9)


@pytest.mark.parametrize("quota", [-1.0, -float("inf")])
def test_margin_of_an_override(quota: float) -> None:
    problem = draw_joint_problem(0, blocks=4)
    rule = HAMUQ(QUOTA, radius=FixedRadius(0.1))
    result = rule.coefficients(torch.from_numpy(problem.gramian), lr=0.1, quota=torch.tensor(quota).double())
    assert result.margin.item() == result.feasible_improvement.item() - quota
