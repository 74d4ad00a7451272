"""The cheapest step inside the trust region, as a search for one number (docs/method.md#solution).

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

from hamu_lightning.solvers._projection import (
    KKT_TOLERANCE,
    Array,
    Mask,
    Projected,
    Projection,
    bound_distance,
    project_exactly,
    solve_multipliers,
    split_space,
)
from hamu_lightning.tolerances import CAPACITY_SLACK, SMALLEST_SINE

MOST_SOLVES = 20
# Newton's method nearly always ends after one to three; a solver takes as long as ten.
_MOST_REVISIONS = 10

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

    Args:
        problem: What it may answer.
        active: `[m]`.
        point: `[r]`, `y`.
        tau: Of the plain step whose projection is `y`.
        inverse: `[r, k]`, the pseudo-inverse of the active rows.
    """

    problem: BallProblem
    active: Mask
    point: Array
    tau: float
    inverse: Array

    @classmethod
    def on(cls, problem: BallProblem, active: Mask) -> Candidate:
        """Compute it."""
        inverse, free = split_space(problem.rows[active])
        shortest = inverse @ problem.bounds[active]
        downhill = -(problem.cost @ free.T) @ free
        slope = float(np.linalg.norm(downhill))
        # As for two gradients: along what is collinear to within the rounding, no step is taken.
        if slope <= SMALLEST_SINE:
            return cls(problem, active, shortest, np.inf, inverse)
        tau = float(np.sqrt(max(1 - float(shortest @ shortest), 0.0))) / slope
        return cls(problem, active, shortest + tau * downhill, tau, inverse)

    @property
    def slack(self) -> Array:
        """`[m]`, by how much each constraint is more than served."""
        return self.problem.rows @ self.point - self.problem.bounds

    @property
    def share(self) -> float:
        """`tau / (1 + tau)`."""
        return 1.0 if self.tau == np.inf else self.tau / (1 + self.tau)

    @property
    def pull(self) -> Array:
        """`[r]`, `(tau l + y) / (1 + tau)`: what the multipliers have to make up, of numbers not much above one."""
        return self.share * self.problem.cost + (1 - self.share) * self.point

    def revise(self) -> Candidate:
        """Newton's next guess: without the constraints that pull the wrong way, with the violated ones."""
        active = self.slack < -KKT_TOLERANCE
        active[self.active] = self.inverse.T @ self.pull > 0
        return Candidate.on(self.problem, active)

    def prove(self, solves: int) -> QPSolution | None:
        """Return the solution if the optimality conditions hold: bounds, length, signs, complementarity, stationarity.

        Stationarity is `tau l + y = rows' m`, divided by `1 + tau`.
        """
        slack, share = self.slack, self.share
        excess = float(np.linalg.norm(self.point)) - 1
        if (slack < -KKT_TOLERANCE).any() or excess > CAPACITY_SLACK:
            return None
        multipliers = np.zeros_like(slack)
        multipliers[self.active], distance = solve_multipliers(self.problem.rows[self.active], self.pull)
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
    """Find the active set by Newton's method, from that of the shortest step, which decides feasibility.

    Where that goes in circles, a solver is asked for the projection `y(tau)`, with tau inside a bracket, and Newton's
    method goes on from there.
    """
    solution = Candidate.on(problem, np.zeros(problem.bounds.size, dtype=bool)).prove(0)  # the plain step
    if solution is not None:
        return solution
    answer = project_exactly(problem.project(0.0))
    if answer is None:
        is_too_far = bound_distance(problem.project(0.0)) > 1 + CAPACITY_SLACK
        return QPSolution(SolveStatus.INFEASIBLE if is_too_far else SolveStatus.FAILED, solves=1)
    if np.linalg.norm(answer.point) > 1 + CAPACITY_SLACK:
        return QPSolution(SolveStatus.INFEASIBLE, solves=1)
    low, high = 0.0, np.inf
    for solves in range(1, MOST_SOLVES + 1):
        candidate = Candidate.on(problem, answer.active)
        solution = _improve(candidate, solves)
        if solution is not None:
            return solution
        tau = candidate.tau if low < candidate.tau < high else _between(low, high)
        answer = yield problem.project(tau)
        if answer is None:
            break
        low, high = (tau, high) if np.linalg.norm(answer.point) < 1 else (low, tau)
    return QPSolution(SolveStatus.FAILED, solves=solves)


def _improve(candidate: Candidate, solves: int) -> QPSolution | None:
    """Revise the candidate until it is proved; None if that leads nowhere."""
    for _ in range(_MOST_REVISIONS):
        solution = candidate.prove(solves)
        if solution is not None:
            return solution
        candidate = candidate.revise()
    return None


def _between(low: float, high: float) -> float:
    """A number inside the bracket: tau may be of any order of magnitude."""
    if high == np.inf:
        return max(10 * low, 1.0)
    return float(np.sqrt(low * high)) if low > 0 else high / 10
