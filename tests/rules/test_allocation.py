"""How the blocks share a quota (docs/method.md#allocations)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from hamu_lightning.rules import HAMUQ, HAMUU, Branch, Coefficients, FixedRadius, RelativeRadius
from tests.oracles import (
    Array,
    JointProblem,
    draw_joint_problem,
    share_by_softmax,
    share_proportionally,
    share_uniformly,
    solve_optimal_allocation,
)

ALLOCATIONS = ("proportional", "uniform", "softmax", "optimal")
SHARES = (1e-3, 0.3, 0.9, 0.999)

rules = pytest.mark.parametrize("kind", [HAMUQ, HAMUU])
allocations = pytest.mark.parametrize("allocation", ALLOCATIONS)


def solve(
    problem: JointProblem,
    quota: float,
    allocation: str,
    kind: type[HAMUQ] | type[HAMUU] = HAMUQ,
    on_infeasible: str = "best_effort",
    override: Tensor | None = None,
) -> Coefficients:
    """The rule's answer under the radii of the problem: the weights' norms are the radii, and a share of one is theirs.

    `problem` is HAMU-Q's; HAMU-U gets the gradients for which it is the same problem.
    """
    given = problem if kind is HAMUQ else problem.exchanged()
    radius = RelativeRadius(1.0, floor=0.0)
    rule = kind(quota, radius=radius, allocation=allocation, on_infeasible=on_infeasible)  # type: ignore[arg-type]
    return rule.coefficients(
        torch.from_numpy(given.gramian),
        lr=0.1,
        weight_norms=torch.from_numpy(problem.radii),
        sizes=torch.tensor([g.size for g in problem.retain]),
        quota=override,
    )


def improvements(problem: JointProblem, result: Coefficients, kind: type[HAMUQ] | type[HAMUU]) -> tuple[float, float]:
    """What the step does on the gradients: the constrained objective first, then the other one."""
    if kind is HAMUQ:
        return problem.improvements(result.values.numpy())
    return problem.exchanged().improvements(result.values.numpy())[::-1]


def capacities(problem: JointProblem) -> list[float]:
    return [float(radius * np.linalg.norm(f)) for radius, f in zip(problem.radii, problem.forget, strict=True)]


@rules
@allocations
@pytest.mark.parametrize("share", SHARES)
def test_feasible_total_is_met(kind: type[HAMUQ] | type[HAMUU], allocation: str, share: float) -> None:
    """By each allocation, inside each block's capacity and radius, and never by a block that cannot serve it."""
    for seed in range(12):
        problem = draw_joint_problem(seed, blocks=3 + seed % 10)
        quota, capacity = share * problem.forget_reach, np.array(capacities(problem))
        result = solve(problem, quota, allocation, kind)
        served, _ = improvements(problem, result, kind)
        # Rounding of some dozens of float64 operations, in units of what the radii allow.
        assert served >= quota - 1e-12 * problem.forget_reach
        predicted = result.forget_improvement if kind is HAMUQ else result.retain_improvement
        assert predicted.item() == pytest.approx(served, abs=1e-12 * problem.forget_reach)
        # By the optimal allocation a block's share is what it gives, and plain descent may give more than is asked.
        shared = result.quota.sum().item()
        assert shared == pytest.approx(max(quota, served) if allocation == "optimal" else quota, rel=1e-9)
        assert (result.quota.numpy() <= capacity * (1 + 1e-9)).all()  # docs/method.md#closed-form, eq. 3.2
        assert result.block_feasible.all()
        given = problem if kind is HAMUQ else problem.exchanged()
        lengths = np.array([np.linalg.norm(d) for d in given.steps(result.values.numpy())])
        assert (lengths <= problem.radii * (1 + 1e-9)).all()
        assert (result.quota.numpy()[capacity == 0] == 0).all()


@rules
@pytest.mark.parametrize("share", SHARES)
def test_the_exact_total_where_no_block_gives_more(kind: type[HAMUQ] | type[HAMUU], share: float) -> None:
    """In conflict every block gives its quota and no more: the predicted total *is* the quota."""
    for seed in range(12):
        problem = in_conflict(draw_joint_problem(seed, blocks=3 + seed % 10))
        quota = share * problem.forget_reach
        for allocation in ALLOCATIONS:
            result = solve(problem, quota, allocation, kind)
            served, _ = improvements(problem, result, kind)
            assert served == pytest.approx(quota, abs=1e-12 * problem.forget_reach)


def in_conflict(problem: JointProblem) -> JointProblem:
    """The same with rf >= 0 in every block."""
    forget = [f * (1.0 if r @ f >= 0 else -1.0) for r, f in zip(problem.retain, problem.forget, strict=True)]
    return JointProblem(problem.retain, tuple(forget), problem.radii)


@rules
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("allocation", ["proportional", "uniform", "softmax"])
def test_shares_against_plain_loops(kind: type[HAMUQ] | type[HAMUU], allocation: str, share: float) -> None:
    for seed in range(12):
        problem = with_hardness(draw_joint_problem(seed, blocks=3 + seed % 10), 10 ** (seed / 8))
        quota, capacity = share * problem.forget_reach, capacities(problem)
        hardness = [float(r @ f) for r, f in zip(problem.retain, problem.forget, strict=True)]
        expected = {
            "proportional": lambda: share_proportionally(capacity, quota),  # noqa: B023
            "uniform": lambda: share_uniformly(capacity, quota),  # noqa: B023
            "softmax": lambda: share_by_softmax(hardness, capacity, quota),  # noqa: B023
        }[allocation]()
        result = solve(problem, quota, allocation, kind).quota.numpy()
        # Rounding of some dozens of float64 operations; in a softmax an exponent of 25 makes of each eps 25.
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12 * quota, err_msg=f"{seed=}")


def with_hardness(problem: JointProblem, largest: float) -> JointProblem:
    """The same gradients in another unit, so that the largest `|rf|` is as given: the softmax is not scale-free."""
    unit = (largest / max(abs(r @ f) for r, f in zip(problem.retain, problem.forget, strict=True))) ** 0.5
    return JointProblem(tuple(r * unit for r in problem.retain), tuple(f * unit for f in problem.forget), problem.radii)


@rules
@pytest.mark.parametrize("allocation", ["uniform", "softmax"])
@pytest.mark.parametrize("share", [0.5, 0.999, 1.0])
def test_every_block_but_the_largest_is_capped(kind: type[HAMUQ] | type[HAMUU], allocation: str, share: float) -> None:
    """Capacities that halve from block to block: each round of refilling caps one or two more."""
    blocks = 40
    sizes = 2.0 ** -np.arange(blocks)
    problem = JointProblem(
        tuple(np.array([0.0, size]) for size in sizes),
        tuple(np.array([size, 0.0]) for size in sizes),
        np.ones(blocks),
    )
    quota = share * problem.forget_reach
    result = solve(problem, quota, allocation, kind)
    served, _ = improvements(problem, result, kind)
    assert served >= quota - 1e-12 * problem.forget_reach
    np.testing.assert_allclose(
        result.quota.numpy(), share_uniformly(capacities(problem), quota), rtol=0, atol=1e-12 * quota
    )


@pytest.mark.parametrize("hardness", [1e3, 1e10, 1e100])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_softmax_of_a_hardness_that_underflows(hardness: float, share: float) -> None:
    """Weights of exp(-1000) are zero, but what the easy blocks leave over still finds room."""
    retain = [np.array([s * hardness, 0.1 * hardness]) for s in (1.0, -1.0, 0.5, 0.0)]
    problem = JointProblem(tuple(retain), tuple(np.array([1.0, 0.0]) for _ in retain), np.ones(4))
    result = solve(problem, share * 4, "softmax")
    assert result.quota.sum().item() == pytest.approx(share * 4, rel=1e-12)
    assert result.block_feasible.all()
    assert result.quota[1].item() == pytest.approx(min(share * 4, 1.0), rel=1e-12)  # the easiest one comes first


def test_proportional_is_the_papers_rule_under_the_papers_radius() -> None:
    problem = draw_joint_problem(3, blocks=6)
    gramian = torch.from_numpy(problem.gramian)
    result = HAMUQ(1e-3).coefficients(gramian, lr=0.1)
    weights = (gramian[:, 0, 0] * gramian[:, 1, 1]).sqrt()
    torch.testing.assert_close(result.quota, 1e-3 * weights / weights.sum(), rtol=1e-14, atol=0)


@rules
@allocations
@pytest.mark.parametrize("on_infeasible", ["best_effort", "skip"])
@pytest.mark.parametrize("excess", [1 + 1e-6, 7.0])
def test_infeasible_total(kind: type[HAMUQ] | type[HAMUU], allocation: str, on_infeasible: str, excess: float) -> None:
    """More than all blocks together can give: each gives all that it has, or the step is left out."""
    for seed in range(6):
        problem = draw_joint_problem(seed, blocks=3 + seed)
        result = solve(problem, excess * problem.forget_reach, allocation, kind, on_infeasible)
        able = torch.tensor(capacities(problem)) > 0
        assert (result.branch[able] == Branch.INFEASIBLE).all()
        assert not result.block_feasible[able].any()
        served, _ = improvements(problem, result, kind)
        given = problem.forget_reach if on_infeasible == "best_effort" else 0.0
        assert served == pytest.approx(given, abs=1e-12 * problem.forget_reach)
        if on_infeasible == "skip":
            assert (result.values[able] == 0).all()


@rules
@allocations
def test_blocks_without_forget_gradient_get_no_quota(kind: type[HAMUQ] | type[HAMUU], allocation: str) -> None:
    """LoRA's A while B is zero, a head that the forget batch does not use. They follow plain descent."""
    for seed in range(6):
        problem = draw_joint_problem(seed, blocks=6)
        forget = tuple(f if b % 2 else np.zeros_like(f) for b, f in enumerate(problem.forget))
        problem = JointProblem(problem.retain, forget, problem.radii)
        quota = 0.5 * problem.forget_reach
        result = solve(problem, quota, allocation, kind)
        assert (result.quota[::2] == 0).all()
        assert result.block_feasible.all()
        assert improvements(problem, result, kind)[0] >= quota - 1e-12 * problem.forget_reach
        own = result.values[::2, 0 if kind is HAMUQ else 1].abs().numpy()
        plain = [radius / np.linalg.norm(r) for radius, r in zip(problem.radii, problem.retain, strict=True)][::2]
        np.testing.assert_allclose(own, plain, rtol=1e-12)  # a root and a quotient


@allocations
def test_one_block_without_any_gradient_and_one_not_finite(allocation: str) -> None:
    problem = draw_joint_problem(4, blocks=5)
    retain, forget = list(problem.retain), list(problem.forget)
    retain[3] = forget[3] = np.zeros_like(retain[3])
    problem = JointProblem(tuple(retain), tuple(forget), problem.radii)
    result = solve(problem, 0.5 * problem.forget_reach, allocation)
    assert result.values[3].tolist() == [0, 0]
    assert result.quota[3] == 0
    forget[4] = forget[4] * np.nan
    result = solve(JointProblem(tuple(retain), tuple(forget), problem.radii), 0.1, allocation)
    assert (result.values == 0).all()
    assert (result.branch == Branch.NOT_FINITE).all()


@pytest.mark.parametrize(
    ("kind", "seed"), [*((HAMUQ, seed) for seed in range(60)), *((HAMUU, seed) for seed in range(60, 75))]
)
def test_optimal_against_a_cone_solver(kind: type[HAMUQ] | type[HAMUU], seed: int) -> None:
    problem = draw_joint_problem(seed)
    quota = float(np.random.default_rng(seed + 1000).uniform(0.02, 0.98)) * problem.forget_reach
    result = solve(problem, quota, "optimal", kind)
    served, free = improvements(problem, result, kind)
    assert served >= quota - 1e-9 * problem.forget_reach
    # The accuracy that is promised; the cone solver's own is a hundred times better.
    assert -free == pytest.approx(solve_optimal_allocation(problem, quota), abs=1e-6 * problem.retain_reach, rel=0)
    for other in ALLOCATIONS[:3]:
        _, least = improvements(problem, solve(problem, quota, other, kind), kind)
        assert free >= least - 1e-9 * problem.retain_reach


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_optimal_where_the_sum_jumps(share: float) -> None:
    """One-element tensors only: each step is plus or minus the radius, and one block stands between."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        retain, forget = (tuple(rng.normal(size=(7, 1))) for _ in range(2))
        problem = JointProblem(retain, forget, 10 ** rng.uniform(-1, 0, 7))
        quota = share * problem.forget_reach
        result = solve(problem, quota, "optimal")
        served, kept = problem.improvements(result.values.numpy())
        assert served >= quota - 1e-9 * problem.forget_reach
        assert -kept == pytest.approx(fractional_knapsack(retain, forget, problem.radii, quota), abs=1e-9)


def fractional_knapsack(retain: Sequence[Array], forget: Sequence[Array], radii: Array, quota: float) -> float:
    """One-element blocks start at plain descent and turn round in the order of their price, the last one in part."""
    steps = [-radius * np.sign(r[0]) for radius, r in zip(radii, retain, strict=True)]
    cost = sum(r[0] * d for r, d in zip(retain, steps, strict=True))
    gain = sum(f[0] * d for f, d in zip(forget, steps, strict=True))
    conflicts = [b for b, (r, f) in enumerate(zip(retain, forget, strict=True)) if r[0] * f[0] > 0]
    for b in sorted(conflicts, key=lambda b: abs(retain[b][0] / forget[b][0])):
        part = min(max((quota - gain) / (2 * radii[b] * abs(forget[b][0])), 0.0), 1.0)
        gain += part * 2 * radii[b] * abs(forget[b][0])
        cost += part * 2 * radii[b] * abs(retain[b][0])
    return float(cost)


@allocations
@rules
def test_equal_blocks_get_equal_shares(kind: type[HAMUQ] | type[HAMUU], allocation: str) -> None:
    gramian = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64).expand(4, 2, 2)
    rule = kind(0.2, radius=FixedRadius(0.1), allocation=allocation)  # type: ignore[arg-type]
    result = rule.coefficients(gramian, lr=0.1)
    torch.testing.assert_close(result.quota, torch.full((4,), 0.05, dtype=torch.float64), rtol=1e-9, atol=0)


@rules
@allocations
@pytest.mark.parametrize("share", [-1.5, -0.5, -0.01])
def test_negative_total(kind: type[HAMUQ] | type[HAMUU], allocation: str, share: float) -> None:
    """The constrained loss may fall by at most so much; the optimal allocation makes the most of it."""
    for seed in range(6):
        problem = draw_joint_problem(seed, blocks=3 + seed)
        quota = share * problem.forget_reach
        result = solve(problem, 0.1, allocation, kind, override=torch.tensor(quota, dtype=torch.float64))
        served, free = improvements(problem, result, kind)
        assert served >= quota - 1e-12 * problem.forget_reach
        lengths = np.array([np.linalg.norm(d) for d in problem.steps(result.values.numpy())])
        if kind is HAMUQ:
            assert (lengths <= problem.radii * (1 + 1e-9)).all()
        if kind is HAMUQ and allocation == "optimal":
            cost = solve_optimal_allocation(problem, quota)
            assert -free == pytest.approx(cost, abs=1e-6 * problem.retain_reach, rel=0)


@rules
@allocations
def test_minus_infinity_is_plain_descent(kind: type[HAMUQ] | type[HAMUU], allocation: str) -> None:
    problem = draw_joint_problem(5, blocks=5)
    result = solve(problem, 0.1, allocation, kind, override=torch.tensor(-torch.inf))
    own, other = (0, 1) if kind is HAMUQ else (1, 0)
    plain = [radius / np.linalg.norm(r) for radius, r in zip(problem.radii, problem.retain, strict=True)]
    np.testing.assert_allclose(result.values[:, own].abs().numpy(), plain, rtol=1e-12)  # a root and a quotient
    assert (result.values[:, other] == 0).all()
    assert result.block_feasible.all()
