"""The closed form of one block against bisection in high precision (DESIGN 1.2)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hamu_lightning.rules import Branch
from hamu_lightning.rules._base import exchange_objectives
from hamu_lightning.rules._closed_form import compute_rounding, label_branches, make_block_problem, solve_blocks
from tests.oracles import distance, solve_by_bisection

N = 1000
# |d - d*| <= 1e-6 R is the accuracy that the design asks for.
TOLERANCE = 1e-6


def draw(n: int, cosines: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    """Gramians [n, 2, 2] with gradients of norm 1e-10 to 1e10 and the given cosines, and radii."""
    rng = np.random.default_rng(seed)
    r, f = 10 ** rng.uniform(-10, 10, n), 10 ** rng.uniform(-10, 10, n)
    rf = cosines * r * f
    gramian = np.stack((np.stack((r * r, rf), -1), np.stack((rf, f * f), -1)), 1)
    return torch.from_numpy(gramian), torch.from_numpy(10 ** rng.uniform(-4, 4, n))


def check(gramian: Tensor, radius: Tensor, share: Tensor, branch: Branch | None, best_effort: bool = True) -> None:
    problem = make_block_problem(gramian, radius, compute_rounding(gramian.dtype))
    # The quota in the unit of the loss; the capacity comes from the Gramian by the obvious formula.
    quota = torch.nan_to_num(share * radius * gramian[:, 1, 1].sqrt(), nan=0.0, neginf=-math.inf)
    quota = torch.where(gramian[:, 1, 1] == 0, share, quota)
    values, labels = solve_blocks(problem, quota, best_effort), label_branches(problem, quota)
    if branch is not None:
        assert (labels == branch).all()
    for k, q, r, value in zip(gramian.tolist(), quota.tolist(), radius.tolist(), values.tolist(), strict=True):
        expected = solve_by_bisection(k[0][0], k[1][1], k[0][1], q, r, best_effort)
        assert distance(k, value, expected) <= TOLERANCE * r, (k, q, r, value)


def uniform(low: float, high: float, seed: int = 7, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, n)


@pytest.mark.parametrize("side", [-1, 1])
def test_rectified(side: int) -> None:
    cosines = side * uniform(0.0, 0.9999)
    shares = np.maximum(-cosines, -0.5) + uniform(1e-6, 1.0, seed=8) * (1 - np.maximum(-cosines, -0.5))
    check(*draw(N, cosines, 1), torch.from_numpy(shares), Branch.RECTIFIED)


def test_direct() -> None:
    cosines = uniform(-0.9999, 0.9999)
    shares = -cosines - uniform(1e-9, 2.0, seed=8)
    check(*draw(N, cosines, 2), torch.from_numpy(shares), Branch.DIRECT)


def test_quota_of_minus_infinity_is_plain_descent() -> None:
    gramian, radius = draw(N, uniform(-1, 1), 3)
    gramian[:3, 0] = gramian[:3, :, 0] = 0  # no retain signal: nothing to gain
    gramian[3:6, 1] = gramian[3:6, :, 1] = 0
    problem = make_block_problem(gramian, radius, compute_rounding(gramian.dtype))
    values = solve_blocks(problem, torch.full((N,), -math.inf, dtype=torch.float64), True)
    expected = torch.where(gramian[:, 0, 0] > 0, -radius / gramian[:, 0, 0].sqrt(), 0.0)
    torch.testing.assert_close(values, torch.stack((expected, torch.zeros(N)), 1).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("best_effort", [True, False])
def test_infeasible(best_effort: bool) -> None:
    gramian, radius = draw(N, uniform(-0.9999, 0.9999), 4)
    check(gramian, radius, torch.from_numpy(1 + 10 ** uniform(-8, 3)), Branch.INFEASIBLE, best_effort)


def test_quota_at_the_capacity_is_feasible() -> None:
    gramian, radius = draw(N, uniform(-0.99, 0.99), 5)
    problem = make_block_problem(gramian, radius, compute_rounding(gramian.dtype))
    values = solve_blocks(problem, problem.capacity, False)
    torch.testing.assert_close(values[:, 1], radius / gramian[:, 1, 1].sqrt(), rtol=1e-12, atol=0)
    # sqrt(1 - q^2) of a q that is one by rounding: 1e-8 of the radius.
    assert (values[:, 0].abs() * gramian[:, 0, 0].sqrt() <= 1e-7 * radius).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_near_parallel(sign: int) -> None:
    sines = 10 ** uniform(-3, -1)
    cosines = sign * np.sqrt((1 - sines) * (1 + sines))
    gramian, radius = draw(N, cosines, 6)
    check(gramian, radius, torch.from_numpy(uniform(0.0, 1.0, seed=9)), None)


@pytest.mark.parametrize("case", ["no_retain", "no_forget", "no_forget_negative", "no_radius", "nothing"])
def test_degenerate(case: str) -> None:
    gramian, radius = draw(N, uniform(-0.9, 0.9), 10)
    shares = torch.from_numpy(uniform(-1.0 if case == "no_forget_negative" else 1e-3, 0.99, seed=11))
    branch = None
    if case in ("no_retain", "nothing"):
        gramian[:, 0] = gramian[:, :, 0] = 0
        branch = Branch.NO_RETAIN_SIGNAL if case == "no_retain" else None
    if case in ("no_forget", "no_forget_negative", "nothing"):
        gramian[:, 1] = gramian[:, :, 1] = 0
        branch = None if case == "no_forget_negative" else Branch.NO_FORGET_SIGNAL
    if case == "no_radius":
        radius, branch = torch.zeros_like(radius), Branch.NO_RADIUS
    check(gramian, radius, shares, branch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dimension", [1, 2, 1000])
@pytest.mark.parametrize("sign", [-1, 1])
def test_collinear_vectors(dtype: torch.dtype, dimension: int, sign: int) -> None:
    """f = k r with the rounding of its own dtype: the step is (Q/ff) g_f, never rounding noise at full radius."""
    generator = torch.Generator().manual_seed(dimension)
    retain = torch.randn(200, dimension, generator=generator, dtype=dtype)
    factors = sign * 10 ** torch.empty(200, 1, dtype=dtype).uniform_(-3, 3, generator=generator)
    forget = retain * factors
    rows = torch.stack((retain, forget), 1)
    gramian = (rows @ rows.mT).double()
    radius = torch.rand(200, dtype=torch.float64, generator=generator) + 0.1
    problem = make_block_problem(gramian, radius, compute_rounding(dtype))
    share = torch.rand(200, dtype=torch.float64, generator=generator) * 0.9
    values = solve_blocks(problem, share * problem.capacity, True)
    step = (values.unsqueeze(-1) * rows.double()).sum(1)
    along = forget.double() / forget.double().norm(dim=1, keepdim=True)
    expected = along * (radius * (share if sign > 0 else 1)).unsqueeze(1)  # antiparallel: the direct step
    # The Gramian's own rounding moves norms by a few eps of its dtype.
    tolerance = 20 * torch.finfo(dtype).eps
    assert ((step - expected).norm(dim=1) <= tolerance * radius).all()


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float64, 1e-5), (torch.float32, 1e-3)])
def test_promises_hold_on_the_tensors(dtype: torch.dtype, floor: float) -> None:
    """Quota and radius on actual gradients, to the accuracies of DESIGN 1.2 (Numerics)."""
    generator = torch.Generator().manual_seed(0)
    for dimension in (2, 3, 10, 2000):
        a, b = torch.randn(2, 300, dimension, generator=generator, dtype=torch.float64)
        sines = 10 ** torch.empty(300, 1, dtype=torch.float64).uniform_(math.log10(floor), 0, generator=generator)
        b -= (a * b).sum(1, keepdim=True) / a.square().sum(1, keepdim=True) * a
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        rows = torch.stack((a, (1 - sines**2).sqrt() * a + sines * b), 1).to(dtype)
        gramian = rows @ rows.mT
        problem = make_block_problem(gramian.double(), torch.full((300,), 0.7).double(), compute_rounding(dtype))
        quota = torch.rand(300, generator=generator, dtype=torch.float64) * problem.capacity
        values = solve_blocks(problem, quota, True)
        step = values[:, 0:1].to(dtype) * rows[:, 0] + values[:, 1:].to(dtype) * rows[:, 1]
        gain, length = (step.double() * rows[:, 1].double()).sum(1), step.double().norm(dim=1)
        sine = sines.squeeze(1).clamp(min=floor)
        if dtype == torch.float64:
            assert (gain >= quota - 1e-10 * problem.capacity).all()
            assert (length <= 0.7 * (1 + 1e-9)).all()
        else:
            assert (gain >= quota - 1e-6 * problem.capacity / sine).all()
            assert (length <= 0.7 * (1 + 1e-6 / sine**2)).all()


def test_exchange_of_objectives() -> None:
    gramian = torch.tensor([[[1.0, 2.0], [2.0, 9.0]]])
    assert exchange_objectives(gramian).tolist() == [[[9.0, 2.0], [2.0, 1.0]]]
