"""The numbers of a step that is about to be applied, by which it is decided whether to go on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hamu_lightning.optim import StepReport

NUMBERS = ("quota", "feasible", "given", "retain_loss", "forget_loss", "is_finite", "is_served")


@dataclass(frozen=True)
class Signals:
    """The numbers of a step that is about to be applied: loss units, and losses at the weights before it.

    `feasible` is infinite where no condition asks for it (`StopCondition.needs_bound`).
    """

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


def pack_signals(report: StepReport, retain_loss: Tensor, forget_loss: Tensor, *, needs_bound: bool) -> Tensor:
    """The `NUMBERS` of `Signals` in one tensor, on the device; without the bound, unless it is needed."""
    step = report.coefficients
    given = step.forget_improvement if step.constrained == 1 else step.retain_improvement
    losses = retain_loss, forget_loss
    bound = step.feasible_improvement if needs_bound else torch.full_like(given, math.inf)
    numbers = (step.total_quota, bound, given, *losses, step.is_finite, step.is_served)
    return torch.stack([number.to(step.total_quota) for number in numbers])
