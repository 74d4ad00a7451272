"""From the Gramians of a step to the problems that are solved, and from their answers to numbers for each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hamu_lightning.rules import Branch
from hamu_lightning.solvers._ball import QPSolution, SolveStatus
from hamu_lightning.solvers._diagnosis import compute_costs
from hamu_lightning.solvers._problem import GroupProblem, make_problem
from hamu_lightning.solvers._projection import Array, Mask

Indices: TypeAlias = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Posed:
    """All numbers of one step, on the host, finite.

    Args:
        gramians: `[P, n, n]`.
        radii: `[P]`.
        members: `[B]`, the problem of each block.
        block_gramians: `[B, n, n]`.
        block_radii: `[B]`.
        moves: `[B]`, whether the block takes part; not if its learning rate is 0.
        n_floors: How many constraints are floors.
        threshold: The squared sine up to which gradients count as parallel.
        bounds: `[n-1]`, floors and quotas of the whole step, loss units.
    """

    gramians: Array
    radii: Array
    members: Indices
    block_gramians: Array
    block_radii: Array
    moves: Mask
    n_floors: int
    threshold: float
    bounds: Array

    @property
    def shares(self) -> Array:
        """`[n-1]`, floors and quotas as shares of the capacity of all problems: the same in each, by capacity."""
        return _divide(self.bounds, compute_capacity(self.gramians, self.radii).sum(axis=0)[1:], self.bounds)

    @property
    def can_move(self) -> Mask:
        """`[P]`, whether each problem has a radius."""
        return self.radii > 0

    def make_problems(self) -> list[GroupProblem]:
        """The problems that have a radius."""
        shares, capacity = self.shares, compute_capacity(self.gramians, self.radii).sum(axis=0)[1:]
        problems = []
        for gramian, radius in zip(self.gramians[self.can_move], self.radii[self.can_move], strict=True):
            # A block without gradient has no share, unless no block has one.
            is_spared = (np.diag(gramian)[1:] <= 0) & (capacity > 0)
            problems.append(
                make_problem(gramian, radius, np.where(is_spared, -np.inf, shares), self.n_floors, self.threshold)
            )
        return problems


def pose_global(gramian: Array, radius: Array, is_moving: Mask) -> tuple[Array, Array, Indices]:
    """One problem for all blocks that may move: `[1, n, n]`, `[1]`, and the number of each block's problem `[B]`."""
    together = gramian[is_moving].sum(axis=0, keepdims=True)
    return together, np.sqrt(np.square(radius[is_moving]).sum(keepdims=True)), np.zeros(radius.size, dtype=np.intp)


def pose_blocks(gramian: Array, radius: Array) -> tuple[Array, Array, Indices]:
    """One problem for each block."""
    return gramian, radius, np.arange(radius.size)


def compute_capacity(gramians: Array, radii: Array) -> Array:
    """`[P, n]`, `R |g_k|`: the most that each problem can give to each group, loss units per step."""
    return np.asarray(radii[:, None] * np.sqrt(np.diagonal(gramians, axis1=1, axis2=2).clip(min=0)))


def tabulate(posed: Posed, problems: Sequence[GroupProblem], solutions: Sequence[QPSolution]) -> dict[str, Array]:
    """Write the answers into arrays by the names of `GroupCoefficients`, all float64."""
    count, n = posed.gramians.shape[:2]
    n_floors, n_quotas = posed.n_floors, n - 1 - posed.n_floors
    values = np.zeros((count, n))
    status, branch = np.full(count, int(SolveStatus.NO_RADIUS)), np.full(count, int(Branch.NO_RADIUS))
    multipliers = np.full((count, n - 1), np.nan)
    costs, retain_costs = np.full((count, n_floors, n_quotas), np.nan), np.full((count, n_floors), np.nan)
    for p, problem, solution in zip(np.flatnonzero(posed.can_move), problems, solutions, strict=True):
        status[p], branch[p] = solution.status, _name_branch(solution)
        if solution.point is not None:
            values[p] = problem.to_coefficients @ solution.point
        if solution.multipliers is not None:
            multipliers[p] = problem.spread(solution.multipliers) * problem.prices
            costs[p], retain_costs[p] = compute_costs(problem, solution)
    feasible = ~np.isin(status, (SolveStatus.INFEASIBLE, SolveStatus.FAILED))
    moves = posed.moves & posed.can_move[posed.members]
    per_block = {
        "values": np.where(moves[:, None], values[posed.members], 0.0),
        "branch": np.where(moves, branch[posed.members], int(Branch.NO_RADIUS)),
        "block_feasible": feasible[posed.members],
        "radius": posed.block_radii,
        "quota": _share_quota(posed),
    }
    group_quota = _share_bounds(posed, compute_capacity(posed.gramians, posed.radii))
    per_problem = {
        "status": status,
        "group_quota": group_quota,
        "multipliers": multipliers,
        "costs": costs,
        "retain_costs": retain_costs,
    }
    total = posed.bounds[n_floors:].sum(keepdims=True)
    return {name: np.asarray(array, float) for name, array in {**per_block, **per_problem, "total": total}.items()}


def _name_branch(solution: QPSolution) -> Branch:
    if solution.multipliers is None:
        return Branch.INFEASIBLE
    return Branch.RECTIFIED if solution.multipliers.any() or solution.status != SolveStatus.SOLVED else Branch.DIRECT


def _share_bounds(posed: Posed, capacity: Array) -> Array:
    """`[P, n-1]`: floors and quotas by capacity; in equal parts where nobody has any."""
    total = capacity.sum(axis=0)[1:]
    shares = _divide(capacity[:, 1:], total, np.full_like(capacity[:, 1:], 1 / len(capacity)))
    return np.multiply(posed.bounds, shares, out=np.zeros_like(shares), where=shares > 0)


def _share_quota(posed: Posed) -> Array:
    """`[B]`: the quotas together, by the blocks' capacities."""
    capacity = compute_capacity(posed.block_gramians, posed.block_radii)
    return np.asarray(_share_bounds(posed, capacity)[:, posed.n_floors :].sum(axis=1))


def _divide(numerator: Array, denominator: Array, otherwise: Array) -> Array:
    """Divide, and take `otherwise` where the denominator is 0."""
    result = np.broadcast_to(otherwise, np.broadcast_shapes(numerator.shape, denominator.shape)).astype(float)
    np.divide(numerator, denominator, out=result, where=np.broadcast_to(denominator > 0, result.shape))
    return result
