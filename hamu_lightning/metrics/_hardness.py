"""How strongly the two objectives oppose each other, averaged over the steps of an epoch."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from typing_extensions import override

from hamu_lightning.checks import check_choice, describe
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import widest_float
from hamu_lightning.metrics._base import HAMUMetric
from hamu_lightning.metrics._dtype import state_float

Number = Literal["kappa", "cosine", "conflicting"]


class HardnessValue(NamedTuple):
    """The hardness of a stretch of training, 0-d each; NaN where nothing was seen that defines the number."""

    kappa: Tensor
    """Mean over updates of `g_r . g_f`, summed over blocks. Unit: squared loss per squared unit of weight."""
    cosine: Tensor
    """Mean cosine of the angle between the two whole gradients, in [-1, 1]. Above 0 they are in conflict."""
    conflicting: Tensor
    """Share of blocks with `g_r . g_f > 0`, in [0, 1], among the blocks where neither gradient is zero."""


class Hardness(HAMUMetric):
    """Mean hardness `kappa = g_r . g_f`, cosine of the angle between the gradients, and share of blocks in conflict.

    Both gradients are raw loss gradients. Retaining wants its loss to fall and forgetting wants its loss to rise, so
    they oppose each other where `kappa > 0`, and a step that serves both is easy to find where `kappa <= 0`.
    Of a step with Gramians `K_b` (one per block `b`, order retain, forget) and their sum `K`, the numbers are

        kappa = K[0, 1],    cosine = K[0, 1] / sqrt(K[0, 0] K[1, 1]),    conflicting: blocks with K_b[0, 1] > 0.

    Steps with a zero gradient have no angle: they count in `kappa` and not in `cosine`. A Gramian that is not finite
    makes all three numbers NaN until `reset`. Across processes the sums are added up.

    `self.log` takes one number, as `Hardness(of="cosine")` gives it; `self.log_dict` all of them, by
    `hardness.compute()._asdict()`.

    Args:
        of: The one number that `compute` returns; None for all three, a `HardnessValue`.
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If an argument is none of its choices.

    Example:
        >>> hardness = Hardness()
        >>> hardness.update(torch.tensor([[[1.0, 1.0], [1.0, 4.0]], [[3.0, -1.0], [-1.0, 5.0]]]))
        >>> hardness.update(torch.tensor([[[4.0, 3.0], [3.0, 9.0]], [[0.0, 0.0], [0.0, 0.0]]]))
        >>> [round(float(number), 4) for number in hardness.compute()]
        [1.5, 0.25, 0.6667]
    """

    steps: Tensor
    kappa_sum: Tensor
    angles: Tensor
    cosine_sum: Tensor
    blocks: Tensor
    conflicts: Tensor

    def __init__(self, of: Number | None = None, **options: Any) -> None:
        super().__init__(**options)
        if of is not None:
            check_choice("of", of, get_args(Number))
        self._of, wide = of, state_float()
        for name in ("kappa_sum", "cosine_sum"):
            self.add_state(name, torch.zeros((), dtype=wide), dist_reduce_fx="sum")
        for name in ("steps", "angles", "blocks", "conflicts"):  # whole numbers: float32 stops counting at 2^24
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @override
    def update(self, gramian: Tensor) -> None:
        """Add one step. Nothing is read on the host.

        Args:
            gramian: `[B, 2, 2]`, the Gramian of each block in the order retain, forget, as `compute_gramian` returns.

        Raises:
            HAMUValueError: If `gramian` has another shape.
        """
        if not isinstance(gramian, Tensor) or gramian.ndim != 3 or gramian.shape[1:] != (2, 2):
            raise HAMUValueError(
                f"Expected `gramian` to be of shape [B, 2, 2], but got {describe(gramian)}. "
                "Give one Gramian of the two gradients per block, as `compute_gramian(retain, forget)` returns."
            )
        gramian = gramian.detach().to(widest_float(gramian.device))
        rr, rf, ff = gramian[:, 0, 0], gramian[:, 0, 1], gramian[:, 1, 1]
        total = gramian.sum(dim=0)
        zero = torch.zeros_like(total[0, 0])
        # Comparisons with NaN are False and would hide it: carry it in the sums.
        poison = torch.where(gramian.isfinite().all(), zero, torch.nan)
        has_angle = (total[0, 0] > 0) & (total[1, 1] > 0)
        # Two roots: the product of two squared norms can leave the range of the dtype.
        cosine = (total[0, 1] / (total[0, 0].sqrt() * total[1, 1].sqrt())).clamp(-1, 1)
        both = (rr > 0) & (ff > 0)
        self.steps = self.steps + 1
        self.kappa_sum = self.kappa_sum + total[0, 1] + poison
        self.angles = self.angles + has_angle
        self.cosine_sum = self.cosine_sum + torch.where(has_angle, cosine, zero) + poison
        self.blocks = self.blocks + both.sum()
        self.conflicts = self.conflicts + (both & (rf > 0)).sum()

    @override
    def compute(self) -> HardnessValue | Tensor:
        """Return the means over all updates since `reset`, of all processes."""
        kappa = self.kappa_sum / self.steps
        conflicting = self.conflicts.to(kappa.dtype) / self.blocks
        value = HardnessValue(kappa, self.cosine_sum / self.angles, torch.where(kappa.isnan(), kappa, conflicting))
        return value if self._of is None else value._asdict()[self._of]
