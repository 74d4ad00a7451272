"""Slow, obviously right answers that the fast paths are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import cvxpy as cp
import mpmath as mp
import numpy as np
import torch
from torch import Tensor

mp.mp.dps = 60
Array = np.ndarray


def solve_by_bisection(
    rr: float, ff: float, rf: float, quota: float, radius: float, best_effort: bool = True
) -> tuple[mp.mpf, mp.mpf]:
    """HAMU-Q for one block: bisection on the exchange rate nu of d(nu) = -R (g_r - nu g_f) / |g_r - nu g_f|.

    On the numbers as they are, in 60 digits; every degenerate case is spelt out.
    """
    rr, ff, rf, quota, radius = map(mp.mpf, (rr, ff, rf, quota, radius))
    zero = mp.mpf(0)
    if radius == 0:
        return zero, zero
    if ff == 0:
        return (-radius / mp.sqrt(rr) if quota <= 0 and rr > 0 else zero), zero
    capacity = radius * mp.sqrt(ff)
    if quota > capacity * (1 + mp.mpf("1e-9")):
        return zero, (radius / mp.sqrt(ff) if best_effort else zero)
    if rr == 0:
        return zero, max(quota, zero) / ff

    def step(nu: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
        length = mp.sqrt(rr - 2 * nu * rf + nu * nu * ff)
        return -radius / length, radius * nu / length

    def improvement(nu: mp.mpf) -> mp.mpf:
        c_r, c_f = step(nu)
        return c_r * rf + c_f * ff

    if improvement(zero) >= quota:
        return step(zero)
    low, high = zero, mp.sqrt(rr / ff)
    while improvement(high) < quota and high < mp.mpf("1e80"):
        low, high = high, high * 16
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if improvement(middle) < quota else (low, middle)
    return step(high)


def distance(gramian: Sequence[Sequence[float]], a: Sequence[float | mp.mpf], b: Sequence[float | mp.mpf]) -> mp.mpf:
    """|d_a - d_b| for two pairs of coefficients, from the Gramian, without cancellation on the way."""
    (rr, rf), (_, ff) = [[mp.mpf(x) for x in row] for row in gramian]
    x, y = mp.mpf(a[0]) - mp.mpf(b[0]), mp.mpf(a[1]) - mp.mpf(b[1])
    return mp.sqrt(abs(x * x * rr + 2 * x * y * rf + y * y * ff))


def solve_cone(retain: list[Array], forget: list[Array], radii: Array, quota: float | None) -> float:
    """The joint problems of DESIGN 1.3 and 1.4 by a cone solver, on the gradients themselves.

    With a quota: the least `sum g_r·d` subject to `sum g_f·d >= quota`. Without one: the largest `sum g_f·d` subject to
    `sum g_r·d <= 0`. Both with `|d_b| <= R_b`. Gradients are scaled to one, radii likewise.
    """
    scale_r = np.sqrt(sum((r**2).sum() for r in retain)) or 1.0
    scale_f = np.sqrt(sum((f**2).sum() for f in forget)) or 1.0
    scale = radii.max()
    steps = [cp.Variable(len(r)) for r in retain]
    cost = sum((r / scale_r) @ d for r, d in zip(retain, steps, strict=True))
    gain = sum((f / scale_f) @ d for f, d in zip(forget, steps, strict=True))
    limits = [cp.norm(d) <= radius / scale for d, radius in zip(steps, radii, strict=True)]
    if quota is None:
        problem, unit = cp.Problem(cp.Maximize(gain), [*limits, cost <= 0]), scale_f
    else:
        problem, unit = cp.Problem(cp.Minimize(cost), [*limits, gain >= quota / scale_f / scale]), scale_r
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    return float(problem.value) * unit * scale


def fill_by_hand(weights: Array, capacity: Array, quota: float) -> Array:
    """Share a quota by weight; what exceeds a capacity goes, by weight, to those with room, until nothing changes."""
    share = np.zeros_like(capacity)
    for _ in range(10 * len(capacity)):
        left = quota - share.sum()
        room = (share < capacity) & (weights > 0)
        if left <= 1e-15 * quota or not room.any():
            break
        share[room] = np.minimum(capacity[room], share[room] + left * weights[room] / weights[room].sum())
    return share


def gramian_of(retain: Array, forget: Array) -> Tensor:
    """[2, 2] in float64."""
    rows = np.stack((retain, forget)).astype(np.float64)
    return torch.from_numpy(rows @ rows.T)
