"""Methods that add up the descent gradients of the two objectives: what they share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from hamu_lightning.gramian import Blocks, check_blocks
from hamu_lightning.rules._base import Rule, as_wide, check_gramian
from hamu_lightning.rules._closed_form import make_block_problem
from hamu_lightning.rules._coefficients import Coefficients
from hamu_lightning.rules._descent import descend, descent_gramian, join_blocks
from hamu_lightning.tolerances import compute_rounding


@dataclass(frozen=True)
class CombinationRule(Rule):
    """An unlearning method that gives each objective's descent gradient a weight; base class.

    The objectives to be lowered are the retain loss and the negative forget loss. Their descent gradients are
    `a_r = g_r` and `a_f = -g_f`; they conflict where `a_r·a_f < 0`, which is `g_r·g_f > 0`. The step is the one that
    SGD takes on the weighted sum:

        d = -lr (w_r a_r + w_f a_f)

    A subclass says what the weights are, in `weigh`. There is neither a quota nor a trust region: the result reports a
    quota of 0, and the length of the step as its radius.

    Args:
        blocks: As for `HAMUQ`. "global", the default, weighs the whole gradients, as the papers do. It stays one
            problem when the optimizer has several parameter groups: the weights are the same in all of them, each
            moves at its own learning rate, and those whose learning rate is 0 are left out like frozen weights.

    Raises:
        HAMUValueError: If `blocks` is none of its choices.
    """

    _: KW_ONLY
    blocks: Blocks = "global"

    def __post_init__(self) -> None:
        """Check the settings."""
        check_blocks(self.blocks)

    @abstractmethod
    def weigh(self, retain: Tensor, forget: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights `w_r` and `w_f` of the two descent gradients, each problem for itself.

        Args:
            retain: `[P]`, float64, not negative: `|a_r|`.
            forget: `[P]`: `|a_f|`.
            cosine: `[P]`: of the angle between `a_r` and `a_f`, negative where they conflict. It is 0 where one of
                them is zero, and exactly 1 or -1 where they are parallel to within rounding.
        """

    def coefficients(
        self,
        gramian: Tensor,
        *,
        lr: float | Tensor,
        weight_norms: Tensor | None = None,
        sizes: Tensor | None = None,
        quota: Tensor | None = None,
    ) -> Coefficients:
        """Compute the step of each block; see `Rule.coefficients`. A quota is of no account."""
        check_gramian(gramian)
        rate = as_wide(lr, gramian).expand(gramian.shape[0]).unsqueeze(1)  # [B, 1]
        rounding, gramian = compute_rounding(gramian.dtype), gramian.to(rate.dtype)
        problems = descent_gramian(join_blocks(gramian, rate) if self.blocks == "global" else gramian)
        # The radius is not asked for: here it is a result.
        shape = make_block_problem(problems, torch.zeros_like(problems[:, 0, 0]), rounding)
        cosine = torch.where(shape.is_collinear, shape.cosine.sign(), shape.cosine)
        weights = torch.stack(self.weigh(shape.retain_norm, shape.forget_norm, cosine), dim=1)  # [B, 2] or [1, 2]
        weights = torch.where(problems.isfinite().all(), weights, torch.nan)
        return Coefficients.without_quota(gramian, descend(gramian, weights, rate))
