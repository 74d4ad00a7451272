"""One problem for n groups, from the Gramian of raw gradients to well-conditioned numbers, and back.

The normal form is that of docs/method.md#normal-form, eq. 7.3 to 7.5.

A step is `d = R e` with `|e| <= 1`. The unit gradients span few dimensions; in an orthonormal basis of these `e` is a
short vector `y`, and `g_k·d / (R |g_k|) = (L y)_k`, where `L L'` is the matrix of cosines. All right-hand sides are
shares: of what a step of length R along the gradient gives.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hamu_lightning.solvers._ball import BallProblem, QPSolution, SolveStatus, search_ball
from hamu_lightning.solvers._elastic import ElasticProblem, search_least_violation
from hamu_lightning.solvers._projection import Array, Mask, Projected, Projection


@dataclass(frozen=True, eq=False)
class GroupProblem:
    """`min g_r·d` subject to `-g_j·d >= U_j` (floors), `g_i·d >= Q_i` (quotas), `|d| <= R`, in shares.

    Constraints are numbered like the Gramian without its first row: the floors come first.

    Args:
        ball: The problem in `y`. Only what can bind has a row.
        numbers: `[m]`, the constraint that each row is.
        n_floors: How many constraints are floors.
        unserved: `[n-1]`, the constraints that ask for something although their gradient is zero.
        to_coefficients: `[n, r]`, from `y` to `R a_k`, the coefficients of least norm: `d = sum_k a_k g_k`.
        prices: `[n-1]`, `|g_r|/|g_k|`, from a share per share to loss units per loss unit; 0 for a zero gradient.
    """

    ball: BallProblem
    numbers: npt.NDArray[np.intp]
    n_floors: int
    unserved: Mask
    to_coefficients: Array
    prices: Array

    @property
    def is_floor(self) -> Mask:
        """`[m]`, whether each row is a floor's."""
        return self.numbers < self.n_floors

    @property
    def asks_in_vain(self) -> bool:
        """Whether those that ask for more forgetting all have a zero gradient: a step would train, not forget."""
        is_asking = self.ball.bounds[~self.is_floor] > 0
        return bool(self.unserved[self.n_floors :].any() and not is_asking.any())

    def spread(self, values: Array) -> Array:
        """Write a number for each row, `[m]`, to its constraint, `[n-1]`; 0 for those that have no row."""
        result = np.zeros(self.unserved.size)
        result[self.numbers] = values
        return result


def make_problem(gramian: Array, radius: float, shares: Array, n_floors: int, threshold: float) -> GroupProblem:
    """Make the problem from finite numbers.

    Args:
        gramian: `[n, n]`, in the order retain, floors, quotas.
        radius: R, positive.
        shares: `[n-1]`, `U_j / (R |g_j|)` and `Q_i / (R |g_i|)`; -inf for what is not asked at all. Where the
            gradient is zero, a positive number says that it cannot be served, any other that there is nothing to ask.
        n_floors: How many of the constraints are floors.
        threshold: The squared sine up to which two gradients count as parallel.
    """
    norms = np.sqrt(np.diag(gramian).clip(min=0))
    inverse = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    basis, to_coefficients = factor_cosines(gramian * inverse[:, None] * inverse, threshold)
    has_row = (norms[1:] > 0) & (shares > -np.inf)
    numbers = np.flatnonzero(has_row)
    rows = orient(basis[1:], n_floors)[numbers]
    return GroupProblem(
        ball=BallProblem(basis[0], rows, shares[numbers]),
        numbers=numbers,
        n_floors=n_floors,
        unserved=(norms[1:] == 0) & (shares > 0),
        to_coefficients=radius * inverse[:, None] * to_coefficients,
        prices=norms[0] * inverse[1:],
    )


def factor_cosines(cosines: Array, threshold: float) -> tuple[Array, Array]:
    """Factor the cosines of the gradients as `L L'`, and return `L`, `[n, r]`, and the transpose of its pseudo-inverse.

    Directions in which the gradients differ by less than rounding are left out. For two gradients with cosine c the
    eigenvalues are `1 + c` and `1 - c`, and their product is the squared sine: the test of `BlockProblem.is_collinear`.
    More gradients have larger sums of roundings. The constraints stay exact: steps in the span of what is kept have
    coefficients `a` with `C a = L y`, `a'C a = |y|^2`.
    """
    sizes, vectors = np.linalg.eigh(cosines)
    kept = sizes * sizes[-1] > threshold * sizes.size / 2
    roots = np.sqrt(sizes[kept])
    return vectors[:, kept] * roots, vectors[:, kept] / roots


def orient(rows: Array, n_floors: int) -> Array:
    """Turn rows of raw gradients into constraints `row·y >= bound`: a protected loss must fall, a forget loss rise."""
    return np.concatenate((-rows[:n_floors], rows[n_floors:]))


def search(problem: GroupProblem, is_best_effort: bool) -> Generator[Projection, Projected | None, QPSolution]:
    """Solve the problem; if it is infeasible, rest or violate as little as possible."""
    solution = yield from search_ball(problem.ball)
    is_infeasible = solution.status is SolveStatus.INFEASIBLE or problem.unserved.any()
    if solution.status is SolveStatus.FAILED or not is_infeasible:
        return solution
    if not is_best_effort or problem.asks_in_vain:
        return _give_up(solution, np.zeros_like(problem.ball.cost))
    if solution.status is SolveStatus.INFEASIBLE:
        solution = yield from _search_best_effort(problem, solution.solves)
    return solution if solution.point is None else _give_up(solution, solution.point)


def _search_best_effort(problem: GroupProblem, solves: int) -> Generator[Projection, Projected | None, QPSolution]:
    """Lexicographic: least violation of the floors, then of the quotas, then the cheapest for retain."""
    ball, is_floor = problem.ball, problem.is_floor
    tiers = [is_floor, ~is_floor] if (ball.bounds[is_floor] > 0).any() else [~is_floor]  # resting serves floors of 0
    for tier in tiers:
        hard = is_floor & ~tier
        elastic = ElasticProblem(ball.rows[tier], ball.bounds[tier], ball.rows[hard], ball.bounds[hard])
        least = yield from search_least_violation(elastic)
        if least is None:
            return QPSolution(SolveStatus.FAILED, solves=solves)
        solves += least.solves
        if least.is_unique:
            return QPSolution(SolveStatus.INFEASIBLE, least.point, solves=solves)
        # What the point gives is feasible by construction.
        given = np.where(tier, np.minimum(ball.bounds, ball.rows @ least.point), ball.bounds)
        ball = replace(ball, bounds=given)
    solution = yield from search_ball(ball)
    return replace(solution, solves=solves + solution.solves)


def _give_up(solution: QPSolution, point: Array) -> QPSolution:
    """The answer to an infeasible problem: a step, but no multipliers."""
    return QPSolution(SolveStatus.INFEASIBLE, point, solves=solution.solves)
