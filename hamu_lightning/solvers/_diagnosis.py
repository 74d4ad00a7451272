"""What cannot be had, and what causes it: conflicts, the joint bound, and who makes protection expensive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
from scipy.optimize import minimize

from hamu_lightning.solvers._ball import QPSolution
from hamu_lightning.solvers._problem import GroupProblem
from hamu_lightning.solvers._projection import Array, compute_smallest_norm, split_space
from hamu_lightning.tolerances import CAPACITY_SLACK

# Up to this many constraints all subsets are tried (about 1,500 for 16 constraints: tens of milliseconds).
_LARGEST_SUBSET = 3
# The bound is found to this share of itself.
_BISECTIONS = 45


def find_conflict(problems: Sequence[GroupProblem]) -> tuple[int, ...]:
    """Find a smallest set of constraints without which every problem is feasible.

    Up to three constraints it is a smallest one; beyond that, one of which no constraint can be spared.

    Returns:
        The numbers of the constraints; empty if the problems are feasible.
    """
    count = max((problem.unserved.size for problem in problems), default=0)
    for size in range(_LARGEST_SUBSET + 1):
        for left_out in combinations(range(count), size):
            if _are_feasible(problems, left_out):
                return left_out
    left_out = tuple(range(count))
    for number in range(count):
        fewer = tuple(other for other in left_out if other != number)
        left_out = fewer if _are_feasible(problems, fewer) else left_out
    return left_out


def _are_feasible(problems: Sequence[GroupProblem], left_out: Iterable[int]) -> bool:
    gone = list(left_out)
    for problem in problems:
        kept = ~np.isin(problem.numbers, gone)
        if np.delete(problem.unserved, gone).any():
            return False
        if compute_smallest_norm(problem.ball.rows[kept], problem.ball.bounds[kept]) > 1 + CAPACITY_SLACK:
            return False
    return True


def compute_feasible_improvement(
    problems: Sequence[GroupProblem], capacity: Array, bounds: Array, n_floors: int
) -> float:
    """Compute the joint bound for n groups: what some step gives at most without harm to retain.

    See docs/method.md#certificates, eq. 6.7 and 6.8.

    It is theta times the sum of the quotas that ask for a rise, for the largest theta such that some step inside the
    radii gives theta times each of them, serves what else is asked, and does not raise the retain loss. If no quota
    asks for a rise, each forget group stands in with its capacity.

    Args:
        problems: The problems that were solved.
        capacity: `[P, n]`, `R |g_k|` of each problem and group, retain first, loss units per step.
        bounds: `[n-1]`, the floors and quotas, loss units per step.
        n_floors: How many of them are floors.

    Returns:
        Loss units per step. 0 if the floors cannot be served, or a request has no gradient.
    """
    total = capacity.sum(axis=0)[1:]
    is_quota = np.arange(bounds.size) >= n_floors
    is_asking = is_quota & (bounds > 0)
    quotas = np.where(is_asking, bounds, 0.0) if is_asking.any() else np.where(is_quota, total, 0.0)
    others = np.where(is_asking | (is_quota & ~is_asking.any()), 0.0, bounds)
    if not problems or not quotas.any() or any(problem.unserved.any() for problem in problems):
        return 0.0
    if len(problems) == 1:
        in_shares = [np.divide(x, total, out=np.zeros_like(total), where=total > 0) for x in (others, quotas)]
        theta = _compute_multiple(problems[0], *in_shares)
    else:
        theta = _bound_multiple(problems, capacity, others, quotas)
    return theta * float(quotas.sum())


def _compute_multiple(problem: GroupProblem, others: Array, quotas: Array) -> float:
    """The theta of one problem: the shortest step grows with it, in proportion if nothing else is asked."""
    rows = np.vstack((-problem.ball.cost, problem.ball.rows))
    others, quotas = (np.append(0.0, bounds[problem.numbers]) for bounds in (others, quotas))

    def length(theta: float) -> float:
        return compute_smallest_norm(rows, others + theta * quotas)

    if not others.any():
        return 1 / length(1.0)
    low, high = 0.0, 1 / float(quotas.max())  # beyond it, one quota exceeds its capacity
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if length(middle) <= 1 else (low, middle)
    return low


def _bound_multiple(problems: Sequence[GroupProblem], capacity: Array, others: Array, quotas: Array) -> float:
    """An upper bound of the theta of several problems together, by the dual; every point of the dual bounds it.

    For `m >= 0` with `quotas·m = 1`, theta is at most `sum_b |sum_k m_k R_b g_k,b| - others·m`, where retain and the
    protected gradients count with the opposite sign.
    """
    unit = capacity.sum(axis=0)
    unit = np.where(unit > 0, unit, 1.0)
    signed = [_weigh(problem, row / unit) for problem, row in zip(problems, capacity, strict=True)]
    asked, needed = np.append(0.0, others) / unit, np.append(0.0, quotas) / unit

    def bound(m: Array) -> tuple[float, Array]:
        moves = [m @ rows for rows in signed]
        lengths = [float(np.linalg.norm(move)) or 1.0 for move in moves]
        slope = sum(rows @ move / length for rows, move, length in zip(signed, moves, lengths, strict=True))
        return float(sum(np.linalg.norm(move) for move in moves) - asked @ m), slope - asked

    start = (needed > 0) / needed.sum()
    found = minimize(
        bound,
        start,
        jac=True,
        method="SLSQP",
        bounds=[(0, None)] * start.size,
        constraints={"type": "eq", "fun": lambda m: needed @ m - 1, "jac": lambda m: needed},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    weights = np.maximum(found.x, 0)
    return max(bound(weights / (needed @ weights))[0], 0.0)


def _weigh(problem: GroupProblem, sizes: Array) -> Array:
    """`[n, r]`, the oriented gradients of all groups times their sizes; zero where a group asks nothing."""
    rows = np.zeros((sizes.size, problem.ball.cost.size))
    rows[0], rows[1 + problem.numbers] = -problem.ball.cost, problem.ball.rows
    return rows * sizes[:, None]


def compute_costs(problem: GroupProblem, solution: QPSolution) -> tuple[Array, Array]:
    """Split the multiplier of each floor into what each request causes, and the rest.

    With the rows `A` and bounds `q` of the constraints that have a multiplier, `l + lambda y = A' mu` and `A y = q`
    give `mu = (A A')^-1 (A l + lambda q)`: linear in the bounds. Row j of `lambda (A A')^-1 q` says how much of
    floor j's multiplier each quota causes. The rest is caused by the floors, and by retain's own step.

    Returns:
        `[n_floors, n_quotas]`, loss units of retain per loss unit of the floor, and the rest, `[n_floors]`.
    """
    count = problem.unserved.size
    costs, rest = np.zeros((count, count)), np.zeros(count)
    assert solution.multipliers is not None
    is_needed = solution.multipliers > 0
    if np.isinf(solution.multipliers).any():
        costs, rest = costs + np.nan, rest + np.nan  # the constraints need the whole radius: no finite prices
    elif is_needed.any():
        numbers, rows = problem.numbers[is_needed], problem.ball.rows[is_needed]
        inverse, _ = split_space(rows)  # A^+ = A' (A A')^-1
        costs[np.ix_(numbers, numbers)] = solution.pull * (inverse.T @ inverse) * problem.ball.bounds[is_needed]
        rest[numbers] = inverse.T @ problem.ball.cost
    floors = slice(None, problem.n_floors)
    rest[floors] += costs[floors, floors].sum(axis=1)
    prices = problem.prices[floors]
    return costs[floors, problem.n_floors :] * prices[:, None], rest[floors] * prices
