"""GRU: gradient rectified unlearning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hamu_lightning.rules._closed_form import safe_divide
from hamu_lightning.rules._combination import CombinationRule


@dataclass(frozen=True)
class GRU(CombinationRule):
    """Take the step nearest to gradient ascent that does not harm retain (Wang et al. 2025, GRU, section 3).

        d = -lr a',   a' = argmin |a - a_f|^2  subject to  a·a_r >= 0
                         = a_f - min(a_f·a_r, 0) / |a_r|^2 a_r

    with `a_r = g_r`, `a_f = -g_f`. The paper's running mean of the retain gradient is left out.

    Args:
        blocks: As for `CombinationRule`.

    Example:
        >>> gramian = torch.tensor([[[1.0, 0.5], [0.5, 1.0]]])  # g_r·g_f > 0: a conflict
        >>> GRU().coefficients(gramian, lr=0.1).values
        tensor([[-0.0500,  0.1000]], dtype=torch.float64)
    """

    def weigh(self, retain: Tensor, forget: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the projection takes from the retain gradient, and 1."""
        return -cosine.clamp(max=0) * safe_divide(forget, retain), torch.ones_like(forget)
