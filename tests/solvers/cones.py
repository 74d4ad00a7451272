"""The n-group problem (docs/method.md#groups, eq. 7.1) on the gradients themselves, for a cone solver: slow, plain."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import numpy.typing as npt
import torch

from hamu_lightning.rules import FixedRadius
from hamu_lightning.solvers import FeasibleDirection, GroupCoefficients

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Requests:
    """Gradients `[n, D]` in the order retain, protected, forget; floors and quotas in loss units; one radius."""

    grads: Array
    floors: Array
    quotas: Array
    radius: float

    @property
    def names(self) -> tuple[str, ...]:
        return ("retain", *(f"p{j}" for j in range(len(self.floors))), *(f"f{i}" for i in range(len(self.quotas))))

    @property
    def reach(self) -> Array:
        """`R |g_k|`, `[n]`: the unit of tolerances."""
        return self.radius * np.linalg.norm(self.grads, axis=1)

    def solve(self, **settings: object) -> GroupCoefficients:
        """The rule's answer. Negative quotas are given as overrides, since a user's own may not be negative."""
        names = self.names[1:]
        floor = dict(zip(names, self.floors.tolist(), strict=False))
        quota = dict(zip(names[len(floor) :], self.quotas.tolist(), strict=True))
        rule = FeasibleDirection(
            {name: max(q, 0.0) for name, q in quota.items()},
            floor,
            radius=FixedRadius(self.radius),
            **settings,  # type: ignore[arg-type]
        )
        gramian = torch.from_numpy(self.grads @ self.grads.T)[None]
        given = {name: torch.tensor(q, dtype=torch.float64) for name, q in quota.items()}
        return rule.coefficients(gramian, lr=0.1, quota=given)

    def step(self, result: GroupCoefficients) -> Array:
        """`d`."""
        return np.asarray(result.values[0].numpy() @ self.grads)


def draw_requests(seed: int, size: float) -> Requests:
    """3 to 12 groups in 2 to 14 dimensions; `size` is the largest share that a quota asks for."""
    rng = np.random.default_rng(seed)
    n, dimension = int(rng.integers(3, 13)), int(rng.integers(2, 15))
    n_floors = int(rng.integers(0, n - 1))
    grads = rng.normal(size=(n, dimension)) * 10 ** rng.uniform(-2, 2, (n, 1))
    if seed % 3 == 0:  # all in conflict with all
        grads += rng.normal(size=dimension) * np.linalg.norm(grads, axis=1, keepdims=True)
    radius = 10 ** rng.uniform(-3, 1)
    reach = radius * np.linalg.norm(grads, axis=1)
    floors = np.where(rng.random(n_floors) < 0.6, 0, rng.uniform(0, size / 3, n_floors))
    quotas = rng.uniform(0, size, n - 1 - n_floors)
    return Requests(grads, floors * reach[1 : 1 + n_floors], quotas * reach[1 + n_floors :], radius)


@dataclass(frozen=True)
class ConeAnswer:
    """All in shares: the least cost, the step, and the duals of floors and quotas. None if infeasible."""

    cost: float
    step: Array
    duals: Array


def solve_cones(requests: Requests) -> ConeAnswer | None:
    """Minimise the retain loss subject to floors, quotas and radius."""
    cost, rows, bounds = _normalise(requests)
    step = cp.Variable(cost.size)
    constraint = rows @ step >= bounds
    problem = cp.Problem(cp.Minimize(cost @ step), [constraint, cp.norm(step) <= 1])  # type: ignore[attr-defined]
    if not _run(problem):
        return None
    return ConeAnswer(float(problem.value), step.value, constraint.dual_value)


def violate_least(requests: Requests) -> tuple[float, float]:
    """The least violation of the floors, and then that of the quotas: L2 norms of shares."""
    cost, rows, bounds = _normalise(requests)
    p = len(requests.floors)
    of_floors, kept = 0.0, bounds[:p]
    if p and bounds[:p].max() > 0:
        step = cp.Variable(cost.size)
        violation = cp.pos(bounds[:p] - rows[:p] @ step)
        problem = cp.Problem(cp.Minimize(cp.norm(violation)), [cp.norm(step) <= 1])  # type: ignore[attr-defined]
        assert _run(problem)
        of_floors = float(problem.value)
        # The cone solver's own tolerance, so that the second problem has an inside.
        kept = np.minimum(kept, rows[:p] @ step.value) - 1e-9
    step = cp.Variable(cost.size)
    violation = cp.pos(bounds[p:] - rows[p:] @ step)
    limits = [cp.norm(step) <= 1, *([rows[:p] @ step >= kept] if p else [])]  # type: ignore[attr-defined]
    problem = cp.Problem(cp.Minimize(cp.norm(violation)), limits)  # type: ignore[attr-defined]
    assert _run(problem)
    return of_floors, float(problem.value)


def _normalise(requests: Requests) -> tuple[Array, Array, Array]:
    units = requests.grads / np.linalg.norm(requests.grads, axis=1, keepdims=True)
    p = len(requests.floors)
    rows = np.concatenate((-units[1 : 1 + p], units[1 + p :]))
    return units[0], rows, np.concatenate((requests.floors, requests.quotas)) / requests.reach[1:]


def _run(problem: cp.Problem) -> bool:
    with warnings.catch_warnings():
        # "may be inaccurate": compared at a tolerance of our own.
        warnings.simplefilter("ignore", UserWarning)
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    return problem.status in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE)
