"""Methods that add up the descent gradients of the two objectives: what they share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from hamu_lightning.gramian import Blocks, check_blocks
from hamu_lightning.rules._base import Branch, Coefficients, Rule, as_wide, check_gramian
from hamu_lightning.rules._closed_form import compute_rounding, make_block_problem


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
        return make_coefficients(gramian, descend(gramian, weights, rate))


def descent_signs(gramian: Tensor, forget: int = 1) -> Tensor:
    """The diagonal of `D` in `a = D g`, `[n]`: -1 for the last `forget` gradients, whose losses are to rise.

    The only place where the sign of the forget objective is turned. The Gramian of the descent gradients is `D K D`,
    and weights `w` of theirs are weights `D w` of the raw ones.
    """
    signs = gramian.new_ones(gramian.shape[-1])
    signs[-forget:] = -1
    return signs


def descent_gramian(gramian: Tensor, forget: int = 1) -> Tensor:
    """`D K D`, `[B, n, n]`: the Gramians of the descent gradients."""
    signs = descent_signs(gramian, forget)
    return gramian * signs * signs.unsqueeze(1)


def join_blocks(gramian: Tensor, rate: Tensor) -> Tensor:
    """The Gramian `[1, n, n]` of all blocks together; those that do not move (`rate` `[B, 1]` is 0) do not count."""
    return torch.where(rate.unsqueeze(2) == 0, 0, gramian).sum(dim=0, keepdim=True)


def descend(gramian: Tensor, weights: Tensor, rate: Tensor, forget: int = 1) -> Tensor:
    """The coefficients `[B, n]` of the raw gradients in the step `d = -lr sum_k w_k a_k`.

    Args:
        gramian: `[B, n, n]`.
        weights: `[B, n]`, or `[1, n]` for all blocks: of the descent gradients.
        rate: `[B, 1]`, learning rates.
        forget: How many of the gradients, the last ones, are of losses that are to rise.
    """
    return -rate * weights * descent_signs(gramian, forget)


def make_coefficients(gramian: Tensor, values: Tensor) -> Coefficients:
    """Make the result for the step `d = values[:, 0] g_r + values[:, 1] g_f`: `[B, 2, 2]` and `[B, 2]`, float64."""
    square = ((gramian @ values.unsqueeze(2)).squeeze(2) * values).sum(dim=1)  # [B]: |d|^2
    is_finite = gramian.isfinite().all() & values.isfinite().all()
    radius = torch.where(is_finite, square.clamp(min=0).sqrt(), 0)
    return Coefficients(
        values=torch.where(is_finite, values, 0),
        branch=torch.where(is_finite, int(Branch.DIRECT), int(Branch.NOT_FINITE)).expand(radius.shape),
        quota=torch.zeros_like(radius),
        total_quota=torch.zeros_like(radius[0]),
        radius=radius,
        block_feasible=is_finite.expand(radius.shape),
        gramian=torch.where(is_finite, gramian, 0),
    )
