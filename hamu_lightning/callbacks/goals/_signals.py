"""The numbers of a step that is about to be applied, by which it is decided whether to go on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hamu_lightning.optim import StepReport

NUMBERS = ("quota", "feasible", "given", "retain_loss", "forget_loss", "is_finite", "is_served")


@dataclass(frozen=True)
class Signals:
    """The numbers of a step that is about to be applied: loss units, and losses at the weights before it."""

    quota: float
    feasible: float
    given: float
    retain_loss: float
    forget_loss: float
    is_finite: float
    is_served: float
    bound: str

    @property
    def free(self) -> str:
        """The objective that the quota is not about."""
        return "retain" if self.bound == "forget" else "forget"


def pack_signals(report: StepReport, retain_loss: Tensor, forget_loss: Tensor) -> Tensor:
    """The `NUMBERS` of `Signals` in one tensor, on the device."""
    step = report.coefficients
    given = step.forget_improvement if step.constrained == 1 else step.retain_improvement
    losses = retain_loss, forget_loss
    numbers = (step.total_quota, step.feasible_improvement, given, *losses, step.is_finite, step.is_served)
    return torch.stack([number.to(step.total_quota) for number in numbers])
