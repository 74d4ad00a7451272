"""NGDiff: the difference of the normalised gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hamu_lightning.rules._closed_form import safe_divide
from hamu_lightning.rules._combination import CombinationRule


@dataclass(frozen=True)
class NGDiff(CombinationRule):
    """Descend along the difference of the two unit gradients (Jin, Bu et al. 2025, g_NGDiff).

        d = -lr (g_r/|g_r| - g_f/|g_f|)

    The step does not depend on the scale of either loss; it is at most `2 lr` long, so that `lr` is an L2 length in
    weight space. A zero gradient counts as zero. The paper's automatic learning rate is left out.

    Args:
        blocks: As for `CombinationRule`.

    Example:
        >>> NGDiff().coefficients(4 * torch.eye(2).expand(1, 2, 2), lr=0.1).values
        tensor([[-0.0500,  0.0500]], dtype=torch.float64)
    """

    def weigh(self, retain: Tensor, forget: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """Return one over each length."""
        one = torch.ones_like(retain)
        return safe_divide(one, retain), safe_divide(one, forget)
