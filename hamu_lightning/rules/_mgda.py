"""MGDA: the shortest convex combination."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hamu_lightning.rules._closed_form import safe_divide
from hamu_lightning.rules._combination import CombinationRule


@dataclass(frozen=True)
class MGDA(CombinationRule):
    """Descend along the shortest convex combination (Désidéri 2012; Sener & Koltun 2018, Algorithm 1, two objectives).

        d = -lr (t a_r + (1-t) a_f),   t = argmin over [0, 1] of |t a_r + (1-t) a_f|^2,   a_r = g_r, a_f = -g_f

    To first order both objectives improve, or the step is zero: nothing improves both. It follows the shorter gradient.

    Args:
        blocks: As for `CombinationRule`.

    Example:
        >>> gramian = torch.tensor([[[4.0, 0.0], [0.0, 1.0]]])
        >>> MGDA().coefficients(gramian, lr=0.1).values
        tensor([[-0.0200,  0.0800]], dtype=torch.float64)
    """

    def weigh(self, retain: Tensor, forget: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """Return t and 1-t, computed in units of the longer gradient: squares of the lengths may overflow."""
        longer = torch.maximum(retain, forget)
        r, f = safe_divide(retain, longer), safe_divide(forget, longer)
        distance = (r - f).square() + 2 * r * f * (1 - cosine)  # |a_r - a_f|^2
        t = safe_divide(f * (f - r * cosine), distance).clamp(0, 1)
        return t, 1 - t
