"""Slow answers that are easy to check against docs/method.md, for the fast paths to be compared with.

Nothing here imports the rules. One block is solved in 50 decimal digits on the numbers as they are, several blocks
together by a cone solver on the gradients themselves, and the shares of a quota by plain loops.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Any, ParamSpec, TypeAlias, TypeVar

import cvxpy as cp
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[np.float64]
Number: TypeAlias = float | Decimal
P = ParamSpec("P")
T = TypeVar("T")

ZERO, ONE = Decimal(0), Decimal(1)
# docs/method.md#closed-form, eq. 3.2: a quota counts as feasible up to this share above the capacity.
SLACK = Decimal("1e-9")
# Parallel vectors leave a remainder of about 1e-50 here, if they are parallel to the last digit.
PARALLEL = 1e-40


def in_fifty_digits(function: Callable[P, T]) -> Callable[P, T]:
    """Run `function` with decimals of 50 digits. The exponents reach 1e+-999999: nothing overflows."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with localcontext() as context:
            context.prec = 50
            return function(*args, **kwargs)

    return wrapped


# One block ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockStep:
    """The step `d = c_r g_r + c_f g_f` of one block, and the name of its case in docs/method.md#closed-form."""

    c_r: Decimal
    c_f: Decimal
    branch: str


@in_fifty_digits
def solve_hamu_q(
    rr: Number,
    ff: Number,
    rf: Number,
    quota: Number,
    radius: Number,
    on_infeasible: str = "best_effort",
    parallel: float = PARALLEL,
) -> BlockStep:
    """Minimise `g_r·d` subject to `g_f·d >= quota` and `|d| <= radius`, for one block.

    Each degenerate case is spelt out; what is left is a bisection on nu of the second form,
    `d(nu) = -R (g_r - nu g_f) / |g_r - nu g_f|`, whose forget improvement `g_f·d(nu)` grows with nu. Gradients count
    as collinear when the squared sine of their angle is at most `parallel`.
    """
    rr, ff, rf, quota, radius = (Decimal(x) for x in (rr, ff, rf, quota, radius))
    if radius == 0:
        return BlockStep(ZERO, ZERO, "no_radius")
    if ff == 0:
        if quota > 0:  # nothing that the block does changes the forget loss
            return BlockStep(ZERO, ZERO, "no_forget_signal")
        return BlockStep(-radius / rr.sqrt() if rr > 0 else ZERO, ZERO, "direct")
    if quota > radius * ff.sqrt() * (1 + SLACK):
        all_the_radius_allows = radius / ff.sqrt() if on_infeasible == "best_effort" else ZERO
        return BlockStep(ZERO, all_the_radius_allows, "infeasible")
    if rr == 0:  # nothing to gain for retain: the shortest step that meets the quota, which is none at all if Q <= 0
        return BlockStep(ZERO, max(quota, ZERO) / ff, "no_retain_signal")
    if radius * rf + quota * rr.sqrt() <= 0:
        return BlockStep(-radius / rr.sqrt(), ZERO, "direct")
    if rr - rf * rf / ff <= Decimal(parallel) * rr:
        return BlockStep(ZERO, quota / ff, "collinear")
    return _bisect(rr, ff, rf, quota, radius)


def _bisect(rr: Decimal, ff: Decimal, rf: Decimal, quota: Decimal, radius: Decimal) -> BlockStep:
    def squared_length(nu: Decimal) -> Decimal:
        return rr - 2 * nu * rf + nu * nu * ff

    def falls_short(nu: Decimal) -> bool:
        """`R (nu ff - rf) / |g_r - nu g_f| < Q`, both sides times their own size: roots are what takes the time."""
        gain = radius * (nu * ff - rf)
        return gain * abs(gain) < quota * abs(quota) * squared_length(nu)

    low, high = ZERO, (rr / ff).sqrt()
    while falls_short(high) and high < Decimal("1e60"):  # a quota at the capacity has nu = infinity
        low, high = high, 8 * high
    for _ in range(70):
        nu = (low + high) / 2
        low, high = (nu, high) if falls_short(nu) else (low, nu)
    length = squared_length(high).sqrt()
    return BlockStep(-radius / length, radius * high / length, "rectified")


def solve_hamu_u(
    rr: Number,
    ff: Number,
    rf: Number,
    quota: Number,
    radius: Number,
    on_infeasible: str = "best_effort",
    parallel: float = PARALLEL,
) -> BlockStep:
    """Maximise `g_f·d` subject to `-g_r·d >= quota` and `|d| <= radius`: HAMU-Q of `(-g_f, -g_r)`."""
    step = solve_hamu_q(ff, rr, rf, quota, radius, on_infeasible, parallel)
    return BlockStep(c_r=-step.c_f, c_f=-step.c_r, branch=step.branch)


@in_fifty_digits
def inner(a: Sequence[Number], b: Sequence[Number]) -> Decimal:
    """The exact inner product of two vectors of floats."""
    total = ZERO
    for x, y in zip(a, b, strict=True):
        total += Decimal(x) * Decimal(y)
    return total


@in_fifty_digits
def distance(
    retain: Sequence[Number], forget: Sequence[Number], one: Sequence[Number], other: Sequence[Number]
) -> Decimal:
    """`|d_one - d_other|` for two pairs of coefficients of the same two gradients."""
    c_r, c_f = Decimal(one[0]) - Decimal(other[0]), Decimal(one[1]) - Decimal(other[1])
    difference = [c_r * Decimal(r) + c_f * Decimal(f) for r, f in zip(retain, forget, strict=True)]
    return inner(difference, difference).sqrt()


# Shares of a quota (docs/method.md#allocations) ---------------------------------------------------------------------


def share_proportionally(capacities: Sequence[float], quota: float) -> list[float]:
    """By capacity."""
    total = math.fsum(capacities)
    return [quota * capacity / total for capacity in capacities]


@in_fifty_digits
def fill(weights: Sequence[Number], capacities: Sequence[float], quota: float) -> list[float]:
    """Share by weight, cap at the capacity, refill the excess by weight where there is room, until nothing changes."""
    shares = [ZERO for _ in capacities]
    while True:
        room = [b for b, capacity in enumerate(capacities) if shares[b] < Decimal(capacity)]
        left = Decimal(quota) - sum(shares, ZERO)
        if not room or left <= Decimal("1e-40") * Decimal(quota):
            return [float(share) for share in shares]
        total = sum((Decimal(weights[b]) for b in room), ZERO)
        for b in room:
            shares[b] = min(shares[b] + left * Decimal(weights[b]) / total, Decimal(capacities[b]))


def share_uniformly(capacities: Sequence[float], quota: float) -> list[float]:
    """The same for each block with capacity."""
    return fill([1.0 if capacity > 0 else 0.0 for capacity in capacities], capacities, quota)


@in_fifty_digits
def share_by_softmax(hardness: Sequence[float], capacities: Sequence[float], quota: float) -> list[float]:
    """By `exp(-g_r·g_f)` over the blocks with capacity; with 50 digits and their exponents no weight underflows."""
    weights = [Decimal(-h).exp() if c > 0 else ZERO for h, c in zip(hardness, capacities, strict=True)]
    return fill(weights, capacities, quota)


# All blocks together (docs/method.md#allocations, eq. 5.6; docs/method.md#certificates, eq. 6.3) --------------------


@dataclass(frozen=True)
class JointProblem:
    """The gradients of several blocks, block by block, and their radii."""

    retain: tuple[Array, ...]
    forget: tuple[Array, ...]
    radii: Array

    @property
    def gramian(self) -> Array:
        """`[B, 2, 2]` in the order retain, forget."""
        return np.stack(
            [np.array([[r @ r, r @ f], [f @ r, f @ f]]) for r, f in zip(self.retain, self.forget, strict=True)]
        )

    @property
    def retain_reach(self) -> float:
        """`sum R_b |g_r,b|`: the most that the retain loss can change. Unit of tolerances."""
        return float(sum(radius * np.linalg.norm(r) for radius, r in zip(self.radii, self.retain, strict=True)))

    @property
    def forget_reach(self) -> float:
        """`sum R_b |g_f,b|`: the most that the forget loss can change, the total capacity."""
        return float(sum(radius * np.linalg.norm(f) for radius, f in zip(self.radii, self.forget, strict=True)))

    def exchanged(self) -> JointProblem:
        """HAMU-U's problem as one of HAMU-Q: `(g_r, g_f) -> (-g_f, -g_r)`."""
        return JointProblem(tuple(-f for f in self.forget), tuple(-r for r in self.retain), self.radii)

    def steps(self, coefficients: Array) -> list[Array]:
        """`d_b` for coefficients `[B, 2]`."""
        rows = zip(coefficients, self.retain, self.forget, strict=True)
        return [c_r * r + c_f * f for (c_r, c_f), r, f in rows]

    def improvements(self, coefficients: Array) -> tuple[float, float]:
        """The forget improvement `sum g_f·d` and the retain improvement `-sum g_r·d` of the whole step."""
        steps = self.steps(coefficients)
        gains = [f @ d for f, d in zip(self.forget, steps, strict=True)]
        costs = [r @ d for r, d in zip(self.retain, steps, strict=True)]
        return math.fsum(gains), -math.fsum(costs)


def solve_optimal_allocation(problem: JointProblem, quota: float) -> float:
    """The least `sum g_r·d` subject to `sum g_f·d >= quota` and `|d_b| <= R_b`."""
    cost, gain, limits = _normalised(problem)
    value = _solve(cp.Problem(cp.Minimize(cost), [gain >= quota / problem.forget_reach, *limits]))
    return value * problem.retain_reach


def solve_certificate(problem: JointProblem) -> float:
    """F: the largest `sum g_f·d` subject to `sum g_r·d <= 0` and `|d_b| <= R_b`."""
    cost, gain, limits = _normalised(problem)
    return _solve(cp.Problem(cp.Maximize(gain), [cost <= 0, *limits])) * problem.forget_reach


def _normalised(problem: JointProblem) -> tuple[Any, Any, list[Any]]:
    """Cost and gain in units of their reach, steps in units of their radius: all numbers are near one.

    One block a row, filled up with zeros: modelling each block by itself takes several times as long as the solver.
    """
    steps = cp.Variable((len(problem.retain), max(r.size for r in problem.retain)))
    cost = cp.sum(cp.multiply(_rows(problem.retain, problem.radii / (problem.retain_reach or 1.0), steps.shape), steps))
    gain = cp.sum(cp.multiply(_rows(problem.forget, problem.radii / (problem.forget_reach or 1.0), steps.shape), steps))
    return cost, gain, [cp.norm(steps, axis=1) <= 1]  # type: ignore[attr-defined]


def _rows(blocks: Sequence[Array], factors: Array, shape: tuple[int, ...]) -> Array:
    rows = np.zeros(shape)
    for row, block, factor in zip(rows, blocks, factors, strict=True):
        row[: block.size] = factor * block
    return rows


def _solve(problem: Any) -> float:
    # Clarabel's own tolerances are 1e-8; the answers are compared at 1e-6 of the reach.
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    if problem.status != cp.OPTIMAL:
        raise RuntimeError(f"The cone solver ended with status {problem.status}.")
    return float(problem.value)


# Problems to ask ----------------------------------------------------------------------------------------------------


def draw_joint_problem(seed: int, blocks: int | None = None) -> JointProblem:
    """A random problem of 2 to 12 blocks. The first has one element, the second is collinear, the third (if there is
    one) has no forget gradient at every other seed. Norms and radii spread over two decades, the unit is arbitrary.
    """
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 13)) if blocks is None else blocks
    sizes = [1, *rng.integers(2, 7, count - 1)]
    unit = 10 ** rng.uniform(-6, 6)
    retain = [unit * 10 ** rng.uniform(-1, 1) * rng.normal(size=n) for n in sizes]
    forget = [unit * 10 ** rng.uniform(-1, 1) * rng.normal(size=n) for n in sizes]
    forget[1] = retain[1] * rng.normal()
    if count > 2 and seed % 2:
        forget[2] = np.zeros_like(forget[2])
    return JointProblem(tuple(retain), tuple(forget), 10 ** rng.uniform(-2, 0, count))


def draw_vectors(seed: int, blocks: int = 6, dimension: int = 4) -> tuple[Tensor, Tensor]:
    """Retain and forget gradients `[B, D]` in float64: the first block is zero, the second collinear."""
    generator = torch.Generator().manual_seed(seed)
    retain, forget = torch.randn(2, blocks, dimension, generator=generator, dtype=torch.float64)
    retain[0] = forget[0] = 0
    forget[1] = -0.5 * retain[1] if seed % 2 else 2 * retain[1]
    return retain, forget


def gramian_of(retain: Tensor, forget: Tensor) -> Tensor:
    """`[B, 2, 2]` for gradients `[B, D]`."""
    rows = torch.stack((retain, forget), 1)
    return rows @ rows.mT
