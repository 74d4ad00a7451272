"""Projections onto polyhedra: the one quadratic program of this package, and what makes an answer to it exact.

    minimise |x - target|^2 / 2   subject to   rows x >= bounds

Its optimality conditions are `x = target + rows' m` with multipliers `m >= 0` that are zero where a constraint is
slack. A solver names the active constraints, which fix `x` in closed form; the multipliers then prove it right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

Array: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]

# What a KKT residual may be, of numbers near one. Rounding alone comes to 1e-11, for gradients parallel to 1e-5.
KKT_TOLERANCE = 1e-9
# Singular values below this share of the largest are rounding; those of independent gradients are above 1e-6.
_RANK_TOLERANCE = 1e-9
# A polyhedron whose nearest point is farther off than this, in units of the problem, counts as empty.
_FARTHEST = 1e6


@dataclass(frozen=True, eq=False)
class Projection:
    """The question: the point of `{x: rows x >= bounds}` that is nearest to `target`.

    Args:
        target: `[r]`.
        rows: `[m, r]`, of length about one.
        bounds: `[m]`.
    """

    target: Array
    rows: Array
    bounds: Array

    @property
    def scale(self) -> float:
        """The largest number in target and bounds: `x` is proportional to it."""
        return float(max(np.abs(self.target).max(initial=0), np.abs(self.bounds).max(initial=0))) or 1.0

    @property
    def is_target_inside(self) -> bool:
        """Whether the target serves all constraints: it is the answer then."""
        return bool((self.rows @ self.target >= self.bounds).all())


@dataclass(frozen=True, eq=False)
class Projected:
    """The answer, proved by its multipliers.

    Args:
        point: `[r]`, `x`.
        active: `[m]`, the constraints that fixed it: they hold with equality.
    """

    point: Array
    active: Mask


def solve_multipliers(rows: Array, direction: Array) -> tuple[Array, float]:
    """Return `m >= 0` that brings `rows' m` nearest to `direction`, and the distance that is left.

    Only independent rows get a positive multiplier, also where rows are repeated.
    """
    if not rows.shape[0]:
        return np.zeros(0), float(np.linalg.norm(direction))
    try:
        multipliers, distance = nnls(rows.T, direction)
    except RuntimeError:  # it did not converge: no proof
        return np.zeros(rows.shape[0]), np.inf
    return multipliers, float(distance)


def split_space(rows: Array) -> tuple[Array, Array]:
    """Return the pseudo-inverse of the rows, `[r, m]`, and an orthonormal basis of what they leave free, `[r - k, r]`.

    `k` is the number of independent rows.
    """
    left, sizes, right = np.linalg.svd(rows)
    rank = int((sizes > _RANK_TOLERANCE * sizes.max(initial=0)).sum())
    return (right[:rank].T / sizes[:rank]) @ left[:, :rank].T, right[rank:]


def make_exact(question: Projection, active: Mask) -> Projected | None:
    """Return the projection if these constraints are active, or None if the proof of that fails."""
    scale, rows = question.scale, question.rows[active]
    target, bounds = question.target / scale, question.bounds / scale
    inverse, _ = split_space(rows)
    point = target + inverse @ (bounds[active] - rows @ target)
    multipliers = np.zeros_like(bounds)
    multipliers[active], distance = solve_multipliers(rows, point - target)
    slack, is_needed = question.rows @ point - bounds, multipliers > 0
    is_proved = distance <= KKT_TOLERANCE and (slack >= -KKT_TOLERANCE).all()
    if not is_proved or (np.abs(slack[is_needed]) > KKT_TOLERANCE).any():
        return None
    return Projected(point * scale, is_needed)


def bound_distance(question: Projection) -> float:
    """Return a length by which each point of the polyhedron is at least away from the target; infinite if it is empty.

    `rows x >= bounds` gives `u·rows (x - target) >= u·ahead` for each `u >= 0`, and so `|x - target| >= u·ahead /
    |rows' u|`. No rounding in `u` spoils this proof.
    """
    weights, ahead, _ = _solve_least_squares(question)
    push, reach = float(weights @ ahead), float(np.linalg.norm(question.rows.T @ weights))
    return question.scale * push / reach if reach > 0 else (np.inf if push > 0 else 0.0)


def _solve_least_squares(question: Projection) -> tuple[Array, Array, float]:
    """Non-negative least squares (Lawson and Hanson 1974, chapter 23): exact, finite, and dense.

    For `z = x - target`, `ahead = bounds - rows target` the residual of `min |[rows'; ahead'] u - (0, .., 0, 1)|`,
    `u >= 0`, is proportional to `(z, -1)`, and its length is `1 / sqrt(1 + |z|^2)`.

    Returns:
        `u`, `ahead` and the length, in units of the question's scale.
    """
    ahead = (question.bounds - question.rows @ question.target) / question.scale
    weights, residual = solve_multipliers(
        np.column_stack((question.rows, ahead)), np.append(np.zeros(question.target.size), 1.0)
    )
    return weights, ahead, residual


def project_exactly(question: Projection) -> Projected | None:
    """Return the projection by least squares alone; None if there is no point, or the proof fails."""
    weights, _, residual = _solve_least_squares(question)
    return None if residual <= 1 / _FARTHEST else make_exact(question, weights > 0)


def compute_smallest_norm(rows: Array, bounds: Array) -> float:
    """Return the length of the shortest `x` with `rows x >= bounds`; infinite if there is none."""
    answer = project_exactly(Projection(np.zeros(rows.shape[1]), rows, bounds))
    return np.inf if answer is None else float(np.linalg.norm(answer.point))
