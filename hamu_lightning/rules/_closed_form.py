"""HAMU-Q in closed form, one block at a time, vectorised over the blocks (docs/method.md#closed-form)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hamu_lightning.rules._coefficients import Branch
from hamu_lightning.tolerances import CAPACITY_SLACK, SMALLEST_SINE


@dataclass(frozen=True)
class BlockProblem:
    """The numbers of each block, `[B]` each, in float64: `|d| <= radius`, gradients by norms and the cosine.

    Norms and the cosine stand for `rr`, `ff` and `rf`, whose products would overflow.

    Args:
        retain_norm: `sqrt(rr)`.
        forget_norm: `sqrt(ff)`.
        cosine: `rf / sqrt(rr ff)` in [-1, 1]; 0 where a norm is 0.
        radius: `R`.
        rounding: How far `|p|^2 / rr` may be off.
    """

    retain_norm: Tensor
    forget_norm: Tensor
    cosine: Tensor
    radius: Tensor
    rounding: float

    @cached_property
    def capacity(self) -> Tensor:
        """`R sqrt(ff)`: the most that each block can give, loss units per step."""
        return self.radius * self.forget_norm

    @cached_property
    def along_retain(self) -> Tensor:
        """`R / |g_r|`, 0 without a retain gradient: the coefficient of a step of length R along `g_r`."""
        return safe_divide(self.radius, self.retain_norm)

    @cached_property
    def along_forget(self) -> Tensor:
        """`R / |g_f|`, 0 without a forget gradient."""
        return safe_divide(self.radius, self.forget_norm)

    @cached_property
    def is_collinear(self) -> Tensor:
        """Whether the gradients are parallel to within the rounding: a relative test."""
        return (1 - self.cosine) * (1 + self.cosine) <= max(self.rounding, SMALLEST_SINE**2)

    @cached_property
    def safe_sine(self) -> Tensor:
        """`|p|/|g_r|`, never underestimated.

        The rounding of the Gramian is added to its square: the rectified part of the step can then only come out too
        short, never too long, so that the radius holds however close to parallel the gradients are.
        """
        return ((1 - self.cosine) * (1 + self.cosine) + self.rounding).sqrt()

    def quota_share(self, quota: Tensor) -> Tensor:
        """`Q / (R |g_f|)`: the quota `[B]` in units of the capacity; 0 for a block without capacity."""
        return safe_divide(quota, self.capacity)


def make_block_problem(gramian: Tensor, radius: Tensor, rounding: float) -> BlockProblem:
    """Make the problem from finite Gramians `[B, 2, 2]` in float64 and radii `[B]`."""
    retain_norm, forget_norm = gramian[:, 0, 0].clamp(min=0).sqrt(), gramian[:, 1, 1].clamp(min=0).sqrt()
    cosine = safe_divide(safe_divide(gramian[:, 0, 1], retain_norm), forget_norm).clamp(-1, 1)
    return BlockProblem(retain_norm, forget_norm, cosine, radius, rounding)


def is_within_capacity(quota: Tensor, problem: BlockProblem) -> Tensor:
    """Whether each block can give its quota inside its radius, `[B]`."""
    return quota <= problem.capacity * (1 + CAPACITY_SLACK)


def label_branches(problem: BlockProblem, quota: Tensor) -> Tensor:
    """Tell for each block which case its quota `[B]` makes (docs/method.md#closed-form): codes of `Branch`, `[B]`."""
    has_no_forget = problem.forget_norm == 0
    has_no_retain = problem.retain_norm == 0
    cases = [  # the first that holds
        (problem.radius <= 0, Branch.NO_RADIUS),
        (has_no_forget & (quota > 0), Branch.NO_FORGET_SIGNAL),
        (has_no_forget, Branch.DIRECT),
        (~is_within_capacity(quota, problem), Branch.INFEASIBLE),
        (has_no_retain, Branch.NO_RETAIN_SIGNAL),
        (problem.cosine + problem.quota_share(quota) <= 0, Branch.DIRECT),  # R rf + Q sqrt(rr) <= 0
        (problem.is_collinear, Branch.COLLINEAR),
    ]
    branch = torch.full_like(quota, int(Branch.RECTIFIED), dtype=torch.long)
    for condition, code in reversed(cases):
        branch = torch.where(condition, int(code), branch)
    return branch


def solve_blocks(problem: BlockProblem, quota: Tensor, best_effort: bool) -> tuple[Tensor, Tensor]:
    """Solve `min g_r·d` subject to `g_f·d >= Q`, `|d| <= R` for each block.

    All cases are listed in docs/method.md#closed-form; the rectified step is eq. 3.5, here in the form of
    eq. 3.8.

    Args:
        problem: The blocks.
        quota: `[B]`, the quota of each block, loss units per step; negative ones allow the forget loss to fall.
        best_effort: Where the quota exceeds the capacity, whether to go as far as the radius allows, or to rest.

    Returns:
        Coefficients `[B, 2]`: `d = c_r g_r + c_f g_f`; and the codes of the cases, `[B]`.
    """
    cosine, sine, share = problem.cosine, problem.safe_sine, problem.quota_share(quota)
    # The lengths of the gradients are divided out: a step along g/|g| of length R has the coefficient R/|g|.
    along_retain, along_forget = problem.along_retain, problem.along_forget
    free = (1 - share * share).clamp(min=0).sqrt()  # s / R, what the quota leaves of the radius
    zero = torch.zeros_like(share)
    steps = {  # (c_r, c_f); a block that is in no row rests
        Branch.DIRECT: (-along_retain, zero),
        Branch.RECTIFIED: (-along_retain * free / sine, along_forget * (share + free * cosine / sine)),
        Branch.COLLINEAR: (zero, along_forget * share),
        # A quota below zero asks for nothing, and without a retain gradient there is nothing to gain by using it up.
        Branch.NO_RETAIN_SIGNAL: (zero, along_forget * share.clamp(min=0)),
        Branch.INFEASIBLE: (zero, along_forget if best_effort else zero),
    }
    branch = label_branches(problem, quota)
    along, across = zero, zero
    for code, (own, other) in steps.items():
        is_case = branch == int(code)
        along, across = torch.where(is_case, own, along), torch.where(is_case, other, across)
    return torch.stack((along, across), dim=1), branch


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide, with 0 where the denominator is 0."""
    return torch.where(denominator == 0, 0, numerator / denominator)
