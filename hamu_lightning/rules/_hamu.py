"""The rules of the paper: HAMU-Q, HAMU-U, and its fine-tuning baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from hamu_lightning.checks import check_choice, store
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import Blocks, check_blocks
from hamu_lightning.rules._allocation import Allocation, allocate_quota, solve_jointly
from hamu_lightning.rules._base import Rule, as_wide, check_gramian
from hamu_lightning.rules._closed_form import (
    BlockProblem,
    is_within_capacity,
    make_block_problem,
    solve_blocks,
)
from hamu_lightning.rules._coefficients import FORGET, RETAIN, Branch, Coefficients, exchange_objectives
from hamu_lightning.rules._quota import Quota, TargetQuota, as_quota, check_quota
from hamu_lightning.rules._radius import LearningRateRadius, Radius, ScaledRadius, check_radius
from hamu_lightning.tolerances import compute_rounding

OnInfeasible = Literal["best_effort", "skip"]


@dataclass(frozen=True)
class HAMUQ(Rule):
    """Raise the forget loss by at least the quota, at the least cost for the retain loss, inside a trust region.

    Solves per block of weights, to first order (Chen et al. 2026, HAMU-Q; docs/method.md#closed-form, direct
    step eq. 3.4, rectified step eq. 3.5):

        minimise g_r·d   subject to   g_f·d >= Q,   |d| <= R

    Args:
        quota: Q, the total rise of the forget loss per step, loss units, not negative; or one of `AbsoluteQuota`,
            `RelativeQuota`, `TargetQuota`.
        radius: R of each block, L2 length in weight space per step. Default: `LearningRateRadius()`, the paper's.
        allocation: How the blocks share the quota (docs/method.md#allocations): "proportional" to what each can give,
            "uniform", "softmax" of the negative hardness, or "optimal" for the total retain change.
        blocks: "tensor", "layer", "global", or a function from a tensor's name to the label of its block.
        on_infeasible: Where a block's quota exceeds what its radius allows: "best_effort" goes as far as the radius
            allows, "skip" leaves the block out.

    Raises:
        HAMUValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> gramian = torch.tensor([[[4.0, 1.0], [1.0, 1.0]]])
        >>> step = HAMUQ(quota=0.1).coefficients(gramian, lr=0.1)
        >>> step.forget_improvement  # the quota, to the precision of float32 Gramians
        tensor(0.1000, dtype=torch.float64)
    """

    quota: float | Quota
    _: KW_ONLY
    radius: Radius = LearningRateRadius()
    allocation: Allocation = "proportional"
    blocks: Blocks = "tensor"
    on_infeasible: OnInfeasible = "best_effort"

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.quota, Quota):
            store(self, quota=check_quota("quota", self.quota))
        check_radius(self.radius)
        check_choice("allocation", self.allocation, get_args(Allocation))
        check_choice("on_infeasible", self.on_infeasible, get_args(OnInfeasible))
        check_blocks(self.blocks)

    @property
    def target_quotas(self) -> Mapping[str, TargetQuota]:
        """The quota if it is a `TargetQuota`."""
        return {"forget": self.quota} if isinstance(self.quota, TargetQuota) else {}

    def in_region(self, scale: float) -> HAMUQ:
        """Return the rule with every radius multiplied by `scale`."""
        return replace(self, radius=ScaledRadius(self.radius, scale))

    def coefficients(
        self,
        gramian: Tensor,
        *,
        lr: float | Tensor,
        weight_norms: Tensor | None = None,
        sizes: Tensor | None = None,
        quota: Tensor | None = None,
    ) -> Coefficients:
        """Compute the step of each block; see `Rule.coefficients`."""
        check_gramian(gramian)
        return self._solve(gramian, as_wide(lr, gramian), weight_norms, sizes, quota)

    def _solve(
        self, gramian: Tensor, lr: Tensor, weight_norms: Tensor | None, sizes: Tensor | None, quota: Tensor | None
    ) -> Coefficients:
        """Solve with checked arguments. The free objective comes first in the Gramian, the constrained one second."""
        rounding = compute_rounding(gramian.dtype)
        # One non-finite number makes every comparison false: such Gramians are replaced before the first one.
        is_finite = gramian.isfinite().all()
        gramian = torch.where(is_finite, gramian, 0).to(lr.dtype)
        radius = self.radius.compute(gramian[:, 0, 0].clamp(min=0).sqrt(), lr, weight_norms, sizes)
        is_finite = is_finite & radius.isfinite().all()
        radius = torch.where(is_finite & (lr != 0), radius, 0)  # a block whose lr is 0 cannot move
        problem = make_block_problem(gramian, radius, rounding)
        given = None if quota is None else as_wide(quota, gramian, "quota")
        total = as_quota(self.quota).compute(problem.capacity.sum(), given)
        is_finite, total = is_finite & ~total.isnan(), torch.where(is_finite & ~total.isnan(), total, 0)
        values, branch, shares = self._share_and_solve(problem, total)
        return Coefficients(
            values=torch.where(is_finite, values, 0),
            branch=torch.where(is_finite, branch, int(Branch.NOT_FINITE)),
            quota=shares,
            total_quota=total,
            radius=radius,
            block_feasible=is_within_capacity(shares, problem) & is_finite,
            gramian=gramian,
        )

    def _share_and_solve(self, problem: BlockProblem, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best_effort = self.on_infeasible == "best_effort"
        if self.allocation == "optimal":
            return solve_jointly(problem, total, best_effort)
        shares = allocate_quota(problem, total, self.allocation)
        return *solve_blocks(problem, shares, best_effort), shares


@dataclass(frozen=True)
class HAMUU(HAMUQ):
    """Lower the retain loss by at least the quota, and raise the forget loss as much as that allows.

    Solves per block of weights, to first order (Chen et al. 2026, HAMU-U):

        maximise g_f·d   subject to   -g_r·d >= U,   |d| <= R

    which is HAMU-Q after `(g_r, g_f) -> (-g_f, -g_r)`. In the result the words change places with the objectives: the
    certificate is the largest retain improvement that does not lower the forget loss, and so on; see `Branch`.

    Args:
        quota: U, the total fall of the retain loss per step, loss units, not negative; or a `RelativeQuota`.
        radius: As for `HAMUQ`; `LearningRateRadius` is `lr |g_f,b|` here.
        allocation: As for `HAMUQ`.
        blocks: As for `HAMUQ`.
        on_infeasible: As for `HAMUQ`.

    Raises:
        HAMUValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> gramian = torch.tensor([[[4.0, 1.0], [1.0, 1.0]]])
        >>> step = HAMUU(quota=0.1).coefficients(gramian, lr=0.1)
        >>> step.retain_improvement
        tensor(0.1000, dtype=torch.float64)
    """

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if isinstance(self.quota, TargetQuota):
            raise HAMUValueError(
                "Expected HAMUU's `quota` to say how far the retain loss falls per step, but got a TargetQuota, which "
                "is about the forget loss. Use HAMUQ."
            )

    def _solve(
        self, gramian: Tensor, lr: Tensor, weight_norms: Tensor | None, sizes: Tensor | None, quota: Tensor | None
    ) -> Coefficients:
        step = super()._solve(exchange_objectives(gramian), lr, weight_norms, sizes, quota)
        return Coefficients(
            values=-step.values.flip(1),  # c_r(U) = -c_f(Q), c_f(U) = -c_r(Q)
            branch=step.branch,
            quota=step.quota,
            total_quota=step.total_quota,
            radius=step.radius,
            block_feasible=step.block_feasible,
            gramian=exchange_objectives(step.gramian),
            constrained=RETAIN,
        )


@dataclass(frozen=True)
class FineTune(Rule):
    """Plain training on the retain data: the paper's fine-tuning baseline, and the proof that we leave no trace.

    `d = -lr g_r`, whatever the forget gradient is. With the wrapper this is bit-identical to the base optimizer alone.

    Args:
        blocks: As for `HAMUQ`; they only matter for what is logged.

    Example:
        >>> import torch
        >>> FineTune().coefficients(torch.eye(2).expand(3, 2, 2), lr=0.1).values[0]
        tensor([-0.1000,  0.0000], dtype=torch.float64)
    """

    is_plain = True
    blocks: Blocks = "tensor"

    def __post_init__(self) -> None:
        """Check the setting."""
        check_blocks(self.blocks)

    def coefficients(
        self,
        gramian: Tensor,
        *,
        lr: float | Tensor,
        weight_norms: Tensor | None = None,
        sizes: Tensor | None = None,
        quota: Tensor | None = None,
    ) -> Coefficients:
        """Return `[-lr, 0]` for each block; see `Rule.coefficients`. The quota is reported as 0."""
        check_gramian(gramian)
        rate = as_wide(lr, gramian).expand(gramian.shape[0])
        gramian = gramian.to(rate.dtype)
        nothing = torch.zeros_like(rate)
        return Coefficients(
            values=torch.stack((-rate, nothing), dim=1),
            branch=torch.full_like(rate, int(Branch.DIRECT), dtype=torch.long),
            quota=nothing,
            total_quota=nothing.sum(),
            radius=self.radius.compute(gramian[:, 0, 0].sqrt(), rate),
            block_feasible=torch.ones_like(rate, dtype=torch.bool),
            gramian=gramian,
            constrained=FORGET,
        )
