"""The cheapest step inside the trust region (DESIGN 1.5), as a search for one number.

    minimise l·y   subject to   rows y >= bounds,  |y| <= 1

in the units of `GroupProblem`. For `tau >= 0` let `y(tau)` be the projection of the plain step `-tau l` onto the
polyhedron. Its length grows with tau: `y(0)` is the shortest feasible step, and the answer is `y(tau)` where the
length is one. On a fixed active set both are known in closed form, so that the search needs tau only to find that set.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import numpy as np

from hamu_lightning.rules._closed_form import CAPACITY_SLACK, SMALLEST_SINE
from hamu_lightning.solvers._projection import (
    KKT_TOLERANCE,
    Array,
    Mask,
    Projected,
    Projection,
    find_active_set,
    solve_multipliers,
    split_space,
)

MOST_SOLVES = 20

Questions: TypeAlias = Generator[Projection, Projected | None, "QPSolution"]
"""A search: it asks for projections, is sent the answers, and returns a solution."""


class SolveStatus(IntEnum):
    """How the problem of a block ended."""

    SOLVED = 0
    """The step is optimal, and as long as the radius."""
    SLACK_RADIUS = 1
    """The step is optimal and shorter than the radius: the constraints alone bound the problem."""
    INFEASIBLE = 2
    """No step inside the radius serves all constraints: `on_infeasible` was applied."""
    FAILED = 3
    """No solver gave an answer that passed the check: no step."""
    NO_RADIUS = 4
    """The radius is zero: no step."""
    NOT_FINITE = 5
    """A number in the Gramians is not finite: no step."""


@dataclass(frozen=True, eq=False)
class QPSolution:
    """The answer for one problem, on the host, in shares: a step of length one is as long as the radius.

    Args:
        status: How it ended.
        point: `[r]`, the step in the basis of `GroupProblem`; None if there is no step.
        multipliers: `[m]`, `mu >= 0` with `l + lambda y = rows' mu`: by how much the optimal `l·y` rises per unit of
            each bound. None unless solved to optimality.
        pull: `lambda >= 0`, the multiplier of the radius. NaN unless solved.
        solves: How many quadratic programs it took.
        residual: The largest violation of an optimality condition: bounds, length, complementarity, stationarity. NaN
            unless solved.
    """

    status: SolveStatus
    point: Array | None = None
    multipliers: Array | None = None
    pull: float = np.nan
    solves: int = 0
    residual: float = np.nan


@dataclass(frozen=True, eq=False)
class BallProblem:
    """`min cost·y` subject to `rows y >= bounds` and `|y| <= 1`.

    Args:
        cost: `[r]`, of length one, or zero.
        rows: `[m, r]`.
        bounds: `[m]`.
    """

    cost: Array
    rows: Array
    bounds: Array

    def project(self, tau: float) -> Projection:
        """The question for `y(tau)`."""
        return Projection(-tau * self.cost, self.rows, self.bounds)


@dataclass(frozen=True, eq=False)
class Candidate:
    """The answer if exactly these constraints are active: `y = y_S - s P l/|P l|`, at `tau = s/|P l|`.

    `y_S` is the shortest step that gives their bounds, `P` projects onto what they leave free, `|y| = 1` fixes `s`.
    Where they leave nothing of the cost, `y = y_S`, and tau is infinite.
    """

    point: Array
    tau: float
    active: Mask

    @classmethod
    def on(cls, problem: BallProblem, active: Mask) -> Candidate:
        """Compute it."""
        inverse, free = split_space(problem.rows[active])
        shortest = inverse @ problem.bounds[active]
        downhill = -(problem.cost @ free.T) @ free
        slope = float(np.linalg.norm(downhill))
        # As for two gradients: along what is collinear to within the rounding, no step is taken.
        if slope <= SMALLEST_SINE:
            return cls(shortest, np.inf, active)
        tau = float(np.sqrt(max(1 - float(shortest @ shortest), 0.0))) / slope
        return cls(shortest + tau * downhill, tau, active)

    def prove(self, problem: BallProblem, solves: int) -> QPSolution | None:
        """Return the solution if the optimality conditions hold: bounds, length, signs, complementarity, stationarity.

        Stationarity is `tau l + y = rows' m`, divided by `1 + tau`, so that no number is much larger than one.
        """
        share = 1.0 if self.tau == np.inf else self.tau / (1 + self.tau)
        slack = problem.rows @ self.point - problem.bounds
        excess = float(np.linalg.norm(self.point)) - 1
        if (slack < -KKT_TOLERANCE).any() or excess > CAPACITY_SLACK:
            return None
        multipliers = np.zeros_like(problem.bounds)
        direction = share * problem.cost + (1 - share) * self.point
        multipliers[self.active], distance = solve_multipliers(problem.rows[self.active], direction)
        if distance > KKT_TOLERANCE or (slack[multipliers > 0] > KKT_TOLERANCE).any():
            return None
        residual = max(excess, distance, *-slack, *slack[multipliers > 0], 0.0)
        status = SolveStatus.SLACK_RADIUS if share == 1 else SolveStatus.SOLVED
        # At the capacity tau is 0: one more unit has no finite price.
        price = np.divide(multipliers, share, out=np.full_like(multipliers, np.inf), where=share > 0)
        price = np.where(multipliers > 0, price, 0)
        pull = np.inf if share == 0 else (1 - share) / share
        return QPSolution(status, self.point, price, pull, solves, float(residual))


def search_ball(problem: BallProblem) -> Questions:
    """Find the active set by Newton's method on tau, inside a bracket; the shortest step decides feasibility."""
    candidate = Candidate.on(problem, np.zeros(problem.bounds.size, dtype=bool))  # the plain step
    solution = candidate.prove(problem, 0)
    low, high, tau = 0.0, np.inf, 0.0
    for solves in range(1, MOST_SOLVES + 1):
        if solution is not None:
            return solution
        answer = yield problem.project(tau)
        if answer is None:
            is_empty = tau == 0 and find_active_set(problem.project(tau)) is None
            return QPSolution(SolveStatus.INFEASIBLE if is_empty else SolveStatus.FAILED, solves=solves)
        length = np.linalg.norm(answer.point)
        if tau == 0 and length > 1 + CAPACITY_SLACK:
            return QPSolution(SolveStatus.INFEASIBLE, solves=solves)
        low, high = (tau, high) if length < 1 else (low, tau)
        candidate = Candidate.on(problem, answer.active)
        solution = candidate.prove(problem, solves)
        tau = candidate.tau if low < candidate.tau < high else _between(low, high)
    return solution or QPSolution(SolveStatus.FAILED, solves=MOST_SOLVES)


def _between(low: float, high: float) -> float:
    """A number inside the bracket: tau may be of any order of magnitude."""
    if high == np.inf:
        return max(10 * low, 1.0)
    return float(np.sqrt(low * high)) if low > 0 else high / 10
