"""Gradient ascent on the forget loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hamu_lightning.rules._combination import CombinationRule


@dataclass(frozen=True)
class GradAscent(CombinationRule):
    """Gradient ascent on the forget loss alone (Jang et al. 2023, Knowledge Unlearning).

        d = +lr g_f

    The retain gradient is measured, and not used. The length of the step grows with the forget gradient, without end.

    Args:
        blocks: As for `CombinationRule`; they only matter for what is logged.

    Example:
        >>> GradAscent().coefficients(torch.eye(2).expand(1, 2, 2), lr=0.1).forget_improvement
        tensor(0.1000, dtype=torch.float64)
    """

    def weigh(self, retain: Tensor, forget: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """Return 0 and 1."""
        return torch.zeros_like(retain), torch.ones_like(forget)
