"""Gradient difference: one weighted sum of both losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hamu_lightning.checks import check_positive, store
from hamu_lightning.rules._combination import CombinationRule


@dataclass(frozen=True)
class GradDiff(CombinationRule):
    """Descent on the retain loss minus the weighted forget loss (Liu et al. 2022; GDiff in TOFU, Maini et al. 2024).

        d = -lr (g_r - weight g_f)

    Args:
        weight: Of the forget loss against the retain loss, positive.
        blocks: As for `CombinationRule`; they only matter for what is logged.

    Example:
        >>> GradDiff(0.5).coefficients(torch.eye(2).expand(1, 2, 2), lr=0.1).values
        tensor([[-0.1000,  0.0500]], dtype=torch.float64)
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        store(self, weight=check_positive("weight", self.weight))

    def weigh(self, retain: Tensor, forget: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 and the weight."""
        return torch.ones_like(retain), torch.full_like(forget, self.weight)
