"""Sharing a total quota among the blocks (docs/method.md#allocations)."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from hamu_lightning.rules._closed_form import BlockProblem, is_within_capacity, label_branches, safe_divide
from hamu_lightning.rules._coefficients import Branch
from hamu_lightning.rules._joint_steps import JointSteps
from hamu_lightning.rules._search import bracket_root

Allocation: TypeAlias = Literal["proportional", "uniform", "softmax", "optimal"]


def allocate_quota(problem: BlockProblem, quota: Tensor, allocation: Allocation) -> Tensor:
    """Share the total quota among the blocks, in proportion to weights and never more than a block can give.

    - proportional: by capacity `R_b |g_f,b|` (under the paper's radius this is the paper's rule).
    - uniform: the same for every block with capacity; what exceeds a block's capacity goes to the others.
    - softmax: by `softmax(-kappa_b)` over the blocks with capacity, the excess likewise. Not scale-free: the shares
      change with the unit of the loss.

    A total that exceeds the total capacity is shared by capacity: every block then has too much.

    Args:
        problem: The blocks.
        quota: 0-d, the total, loss units per step. A negative one is shared by weight, -inf included.
        allocation: One of the three.

    Returns:
        `[B]`, summing to the total.
    """
    capacity = problem.capacity
    has_capacity = capacity > 0
    if allocation == "proportional":
        return _share(quota, capacity)
    if allocation == "uniform":
        weights = has_capacity.to(capacity.dtype)
    else:
        kappa = problem.cosine * problem.retain_norm * problem.forget_norm
        weights = torch.softmax(torch.where(has_capacity, -kappa, -torch.inf), dim=0)
        # A block with capacity keeps some weight, so that an excess finds room; all without capacity gives NaN above.
        weights = torch.where(has_capacity, weights.clamp(min=1e-30), 0)
    filled = torch.minimum(capacity, weights * _fill_level(weights, capacity, quota))
    filled = torch.where(quota < capacity.sum(), filled, _share(quota, capacity))
    return torch.where(quota > 0, filled, _share(quota, weights))


def solve_jointly(problem: BlockProblem, quota: Tensor, best_effort: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Solve `min sum_b g_r,b·d_b` subject to `sum_b g_f,b·d_b >= Q`, `|d_b| <= R_b`.

    The optimal allocation, docs/method.md#allocations, eq. 5.6 to 5.9.

    All blocks move with one exchange rate between the objectives: `d_b = -R_b v_b/|v_b|` with
    `v = (1-t) g_r/s_r - t g_f/s_f`, where `s_r`, `s_f` are the overall norms. The total forget improvement increases
    with t. Where it jumps over Q, the convex combination of the two steps beside the jump meets Q.

    Args:
        problem: The blocks.
        quota: 0-d, the total, loss units per step.
        best_effort: Where the total exceeds the capacity, whether to go as far as the radii allow, or to rest.

    Returns:
        Coefficients `[B, 2]`, the codes of the branches `[B]`, and what each block gives of the quota `[B]`.
    """
    blocks = JointSteps(problem)
    along, across = blocks.step(bracket_root(blocks.total_gain, quota, blocks.excess_on_host))  # [2, B] or [1, B]
    if len(along) == 2:
        below, above = blocks.gains(along, across).sum(dim=1)
        share = safe_divide(quota - below, above - below).clamp(0, 1)
        along, across = torch.lerp(along[:1], along[1:], share), torch.lerp(across[:1], across[1:], share)
    along, across = along[0], across[0]
    is_direct = -(problem.capacity @ problem.cosine) >= quota
    along = torch.where(is_direct, -problem.along_retain, along)
    across = torch.where(is_direct, 0, across)

    by_capacity = _share(quota, problem.capacity)
    is_feasible = is_within_capacity(by_capacity, problem).all()
    shares = torch.where(is_feasible, blocks.gains(along, across), by_capacity)
    farthest = problem.along_forget if best_effort else torch.zeros_like(along)
    values = torch.stack((torch.where(is_feasible, along, 0), torch.where(is_feasible, across, farthest)), dim=1)
    branch = label_branches(problem, shares)
    # Next to the quotas that the blocks end with, every block that may turn looks rectified.
    is_plain = is_direct & ((branch == int(Branch.RECTIFIED)) | (branch == int(Branch.COLLINEAR)))
    return values, torch.where(is_plain, int(Branch.DIRECT), branch), shares


def _share(quota: Tensor, weights: Tensor) -> Tensor:
    """The quota in proportion to the weights; in equal parts where all weights are zero (then nobody can serve it)."""
    equal = torch.full_like(weights, 1 / weights.numel())
    shares = torch.where(weights.sum() > 0, safe_divide(weights, weights.sum()), equal)
    return torch.where(shares > 0, quota * shares, 0)


def _fill_level(weights: Tensor, capacity: Tensor, quota: Tensor) -> Tensor:
    """The level `x` at which `sum_b min(capacity_b, x weights_b) = quota`, 0-d: blocks fill up in order of cap/weight.

    For a quota below the total capacity. With the k first blocks full, the others share what is left: that gives a
    level for each k. A wrong k counts a block as full that is not, or the reverse, and so comes out too low.
    """
    order = torch.where(weights > 0, safe_divide(capacity, weights), torch.inf).argsort()
    capacity, weights = capacity[order], weights[order]
    left = quota - (capacity.cumsum(0) - capacity)  # [B], when the blocks before this one are full
    levels = safe_divide(left, weights.flip(0).cumsum(0).flip(0))
    return torch.where(weights > 0, levels, 0).max()
