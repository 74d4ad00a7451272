"""The least violation, where no step inside the trust region serves all constraints.

    minimise |v|^2 / 2   subject to   soft y + v >= wanted,  hard y >= bounds,  |y| <= 1

With `lambda`, the multiplier of the length, this is a projection again: of the origin, in `(sqrt(lambda) y, v)`. The
length of `y` falls with lambda; on a fixed active set, the lambda at which it is one solves a secular equation, that of
ridge regression in what the active hard constraints leave free.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.optimize import brentq

from hamu_lightning.solvers._ball import MOST_SOLVES
from hamu_lightning.solvers._projection import (
    KKT_TOLERANCE,
    Array,
    Mask,
    Projected,
    Projection,
    solve_multipliers,
    split_space,
)

# Singular values below this share of the rows' length are rounding: in their direction no violation can be mended.
_RANK_TOLERANCE = 1e-9
# Where the hard constraints alone need the whole radius, the rest of the step has this length (squared): rounding.
_LEAST_ROOM = 1e-18


@dataclass(frozen=True, eq=False)
class LeastViolation:
    """Where to go if not all can be served.

    Args:
        point: `[r]`, `y`.
        is_unique: Whether the length of the step decides, so that no other one violates as little.
        solves: How many quadratic programs it took.
    """

    point: Array
    is_unique: bool
    solves: int


Repair: TypeAlias = Generator[Projection, Projected | None, LeastViolation | None]


@dataclass(frozen=True, eq=False)
class ElasticProblem:
    """`min |v|^2 / 2` subject to `soft y + v >= wanted`, `hard y >= bounds`, `|y| <= 1`.

    Args:
        soft: `[p, r]`.
        wanted: `[p]`.
        hard: `[h, r]`; some `|y| <= 1` must serve them.
        bounds: `[h]`.
    """

    soft: Array
    wanted: Array
    hard: Array
    bounds: Array

    def project(self, pull: float) -> Projection:
        """The question for the lambda `pull`; rows are scaled to a length of about one."""
        root, (p, h) = np.sqrt(pull), (self.wanted.size, self.bounds.size)
        size = np.sqrt(1 + pull)
        rows = np.block([[self.soft / size, root / size * np.eye(p)], [self.hard, np.zeros((h, p))]])
        bounds = np.concatenate((self.wanted * (root / size), self.bounds * root))
        return Projection(np.zeros(rows.shape[1]), rows, bounds)

    def is_optimal(self, point: Array, pull: float) -> bool:
        """Whether the optimality conditions hold: `lambda y = soft' v + hard' nu`, relative to its terms."""
        violation = np.maximum(self.wanted - self.soft @ point, 0)
        slack = self.hard @ point - self.bounds
        if (slack < -KKT_TOLERANCE).any() or np.linalg.norm(point) > 1 + KKT_TOLERANCE:
            return False
        direction = pull * point - self.soft.T @ violation
        _, distance = solve_multipliers(self.hard[slack <= KKT_TOLERANCE], direction)
        return distance <= KKT_TOLERANCE * (1 + pull + float(violation.sum()))


def search_least_violation(problem: ElasticProblem) -> Repair:
    """Find the active set by Newton's method on lambda, inside a bracket; None if no answer passes the check."""
    low, high, pull = 0.0, np.inf, 1.0
    for solves in range(1, MOST_SOLVES + 1):
        answer = yield problem.project(pull)
        if answer is None:
            return None
        point, found = _solve_on(problem, answer.active)
        if problem.is_optimal(point, found):
            return LeastViolation(point, found > 0, solves)
        length = np.linalg.norm(answer.point[: point.size]) / np.sqrt(pull)
        low, high = (pull, high) if length > 1 else (low, pull)
        pull = found if low < found < high else (10 * low if high == np.inf else np.sqrt(low * high) or high / 100)
    return None


def _solve_on(problem: ElasticProblem, active: Mask) -> tuple[Array, float]:
    """The step and lambda if exactly these constraints are active."""
    is_soft, is_hard = np.split(active, [problem.wanted.size])
    inverse, free = split_space(problem.hard[is_hard])
    fixed = inverse @ problem.bounds[is_hard]
    soft = problem.soft[is_soft]
    missing = problem.wanted[is_soft] - soft @ fixed
    left, sizes, right = np.linalg.svd(soft @ free.T, full_matrices=False)
    kept = sizes > _RANK_TOLERANCE
    sizes, pushes = sizes[kept], sizes[kept] * (left.T @ missing)[kept]
    pull = _solve_secular(sizes**2, pushes, max(1 - float(fixed @ fixed), _LEAST_ROOM))
    along = np.divide(pushes, sizes**2 + pull)
    return fixed + (along @ right[kept]) @ free, pull


def _solve_secular(squares: Array, pushes: Array, room: float) -> float:
    """The lambda >= 0 with `sum (pushes / (squares + lambda))^2 = room`; 0 where the sum is smaller from the start."""

    def excess(pull: float) -> float:
        return float(np.linalg.norm(pushes / (squares + pull)) - np.sqrt(room))

    if excess(0.0) <= 0:
        return 0.0
    most = 2 * float(np.linalg.norm(pushes)) / np.sqrt(room)
    return float(brentq(excess, 0.0, most, xtol=1e-300, rtol=1e-15))
