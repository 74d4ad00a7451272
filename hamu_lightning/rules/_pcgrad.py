"""PCGrad: gradient surgery."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hamu_lightning.rules._closed_form import safe_divide
from hamu_lightning.rules._combination import CombinationRule


@dataclass(frozen=True)
class PCGrad(CombinationRule):
    """Project each descent gradient off the other where they conflict, and add them up (Yu et al. 2020, Algorithm 1).

        d = -lr (a_r' + a_f'),   a_i' = a_i - min(a_i·a_j, 0) / |a_j|^2 a_j,   a_r = g_r, a_f = -g_f

    To first order a step never harms either objective. Without a conflict it is that of `GradDiff(1)`.

    Args:
        blocks: As for `CombinationRule`.

    Example:
        >>> import torch
        >>> gramian = torch.tensor([[[1.0, 0.5], [0.5, 1.0]]])  # g_r·g_f > 0: a conflict
        >>> PCGrad().coefficients(gramian, lr=0.1).values
        tensor([[-0.1500,  0.1500]], dtype=torch.float64)
    """

    def weigh(self, retain: Tensor, forget: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 plus what the other's projection takes from this one."""
        conflict = -cosine.clamp(max=0)
        return 1 + conflict * safe_divide(forget, retain), 1 + conflict * safe_divide(retain, forget)
