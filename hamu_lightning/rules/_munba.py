"""MUNBa: a bargain between two players."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hamu_lightning.rules._closed_form import safe_divide
from hamu_lightning.rules._combination import CombinationRule


@dataclass(frozen=True)
class MUNBa(CombinationRule):
    """Nash bargain of the two objectives (Wu & Harandi 2025, MUNBa; the condition: Navon et al. 2022, Claim 3.1).

        d = -lr (w_r a_r + w_f a_f),   G'G w = 1/w,   G = (a_r, a_f) = (g_r, -g_f)
        for two players:   w_i = 1 / (|a_i| sqrt(1 + cos(a_r, a_f)))

    The step is `sqrt(2) lr` long whatever the scale of the losses. Where a gradient is zero, or the two are opposite,
    nothing improves both: no step.

    Args:
        blocks: As for `CombinationRule`.

    Example:
        >>> MUNBa().coefficients(4 * torch.eye(2).expand(1, 2, 2), lr=0.1).values
        tensor([[-0.0500,  0.0500]], dtype=torch.float64)
    """

    def weigh(self, retain: Tensor, forget: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two-player solution."""
        unit = safe_divide(torch.ones_like(cosine), (1 + cosine).sqrt())
        unit = torch.where((retain > 0) & (forget > 0), unit, 0)
        return safe_divide(unit, retain), safe_divide(unit, forget)
