"""What one step did: numbers on the device, read when somebody looks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hamu_lightning.rules import Branch, Coefficients


@dataclass(frozen=True, eq=False, repr=False)
class StepReport:
    """What one step of `HAMUOptimizer` computed and promised.

    Every number is a tensor on the device; nothing has been read on the host. Shapes are `[B]`, one entry per block,
    or 0-d for the whole model.

    Args:
        gramian: `[B, n, n]`, the Gramians of the gradients of `n` groups (retain and forget: 2), of the means over the
            accumulation window.
        coefficients: What the rule answered.
        lr: `[B]`, learning rates.
        labels: The names of the blocks.
        follows_rule: Whether the weights move by the rule's own step, but for rounding: with plain SGD, or exactly.
        actual_changes: `[n]`, `g_k·dw` of each group for the weights' actual change `dw`; None unless
            `track_actual=True`. They differ from the predicted ones by what the base optimizer does on its own.
    """

    gramian: Tensor
    coefficients: Coefficients
    lr: Tensor
    labels: tuple[str, ...]
    follows_rule: bool = False
    actual_changes: Tensor | None = None

    def __repr__(self) -> str:
        """The summary, a line for each number; reads the host."""
        lines = [f"    {name:<27}{float(number):.4g}" for name, number in self.summary().items()]
        return "\n".join((f"StepReport of {len(self.labels)} blocks, per step:", *lines))

    @property
    def actual_improvements(self) -> Tensor | None:
        """`[n]`, the actual changes counted positive where they serve: the retain loss falls, the forget loss rises."""
        return None if self.actual_changes is None else self.coefficients.count_as_served(self.actual_changes)

    def improvement(self, group: str) -> Tensor:
        """0-d, what the step does for a group: the actual improvement where it was measured, else the predicted one."""
        step, actual = self.coefficients, self.actual_improvements
        return step.improvements[group] if actual is None else actual[step.groups.index(group)]

    @property
    def kappa(self) -> Tensor:
        """`[B]`, the paper's hardness `g_r·g_f`: positive where forgetting and retaining conflict.

        Here and below `g_f` is the sum of the gradients of all groups to forget.
        """
        return self.coefficients.pair_gramian[:, 0, 1]

    @property
    def cosine(self) -> Tensor:
        """`[B]`, the cosine of the angle between the two gradients; 0 where one of them is zero."""
        return _cosine(self.coefficients.pair_gramian)

    @property
    def total_cosine(self) -> Tensor:
        """0-d, the cosine of the angle between the two gradients of the whole model."""
        return _cosine(self.coefficients.pair_gramian.sum(dim=0))

    @property
    def thresholds(self) -> tuple[Tensor, Tensor]:
        """`kappa_1` and `kappa_2`, `[B]` each (docs/method.md#closed-form, eq. 3.3, 3.12).

        Up to `kappa_1 = -Q sqrt(rr)/R` the plain step is enough. Above `kappa_2 = sqrt(rr (ff - Q^2/R^2))` (for a
        positive kappa) the block must harm the other objective. `-inf` and `nan` where the radius is zero.
        """
        gramian, step = self.coefficients.pair_gramian, self.coefficients
        free, bound = (0, 1) if step.constrained == 1 else (1, 0)
        free_norm = gramian[:, free, free].clamp(min=0).sqrt()
        share = step.quota / step.radius
        return -share * free_norm, free_norm * (gramian[:, bound, bound] - share.square()).clamp(min=0).sqrt()

    def share(self, *branches: Branch) -> Tensor:
        """0-d, the share of blocks whose step took one of these branches."""
        return torch.stack([self.coefficients.branch == int(b) for b in branches]).any(dim=0).double().mean()

    def left_out_unless(self, is_finite: Tensor) -> StepReport:
        """This report where `is_finite` (0-d, bool) is True, and elsewhere that of a step that was left out."""
        step = self.coefficients
        values = torch.where(is_finite, step.values, 0)
        branch = torch.where(is_finite, step.branch, int(Branch.NOT_FINITE))
        return replace(self, coefficients=replace(step, values=values, branch=branch))

    def summary(self) -> dict[str, Tensor]:
        """The 0-d numbers that the callback logs, by name. Units: loss units per step, and shares of blocks."""
        step, actual = self.coefficients, self.actual_improvements
        measured = {}
        if actual is not None:
            measured = {f"actual_{name}_improvement": actual[n] for n, name in enumerate(step.groups)}
        return {
            **measured,
            "kappa": self.kappa.sum(),
            "cosine": self.total_cosine,
            **step.summary(),
            "direct": self.share(Branch.DIRECT),
            "rectified": self.share(Branch.RECTIFIED, Branch.COLLINEAR, Branch.NO_RETAIN_SIGNAL),
            "infeasible": (~step.block_feasible).double().mean(),
            "skipped": self.share(Branch.NO_RADIUS, Branch.NO_FORGET_SIGNAL, Branch.NOT_FINITE),
        }


def _cosine(gramian: Tensor) -> Tensor:
    norms = gramian[..., 0, 0].clamp(min=0).sqrt() * gramian[..., 1, 1].clamp(min=0).sqrt()
    return torch.where(norms > 0, gramian[..., 0, 1] / norms, 0).clamp(-1, 1)
