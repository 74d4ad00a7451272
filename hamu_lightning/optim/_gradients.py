"""The gradients of one step: their Gramians, the one gradient that they become, and what a change does to them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from hamu_lightning.gramian import compute_gramian
from hamu_lightning.optim._combine import combine_
from hamu_lightning.optim._layout import Layout

Combined: TypeAlias = tuple[list[Tensor | None], Tensor]
"""For each tensor of the layout a gradient or None, and whether they are finite, 0-d, bool."""


@dataclass(frozen=True, eq=False)
class StepGradients:
    """The gradients of the groups that take part in a step.

    Args:
        groups: The names of the groups, retain first.
        lists: For each group its gradients, in the order of the layout; None counts as zero.
        layout: The tensors, and their blocks.
        shares: For each group which share of the mean over its accumulation window the gradients are.
    """

    groups: tuple[str, ...]
    lists: list[list[Tensor | None]]
    layout: Layout
    shares: tuple[float, ...]

    def gramian(self) -> Tensor:
        """Compute the Gramians of the mean gradients, `[B, n, n]`."""
        return self._as_means(self._as_means(self.multiply()).mT).mT

    def multiply(self) -> Tensor:
        """Compute the Gramians of the gradients as they are, `[B, n, n]`."""
        return compute_gramian(*self.lists, blocks=self.layout.blocks)

    def equivalent(self, values: Tensor, lr: Tensor, is_finite: Tensor, *, exact: bool, keeps_last: bool) -> Combined:
        """Compute the gradient that makes an optimizer apply coefficients: `-c/lr` times each (`exact`: `-c` times).

        Args:
            values: `[B, n]`, what the mean gradients are multiplied by in the step.
            lr: `[B]`, learning rates. Where one is 0 the result is zero.
            is_finite: 0-d, bool. Where it is False the result is zero.
            exact: Whether the optimizer has the learning rate 1.
            keeps_last: Whether the last group's gradients, over which the result is written, are needed again.
        """
        rate = lr.unsqueeze(1)
        # The rule saw mean gradients; these are shares of them.
        factors = self._as_means(-values)
        return self.combine(torch.where(rate == 0, 0, factors if exact else factors / rate), is_finite, keeps_last)

    def combine(self, factors: Tensor, is_finite: Tensor, keeps_last: bool) -> Combined:
        """Add up the gradients as they are; see `combine_`."""
        lists = self.lists
        if keeps_last:
            lists = [*lists[:-1], [None if g is None else g.clone() for g in lists[-1]]]
        return combine_(lists, factors, self.layout.blocks, is_finite)

    def measure(self, before: Sequence[Tensor]) -> Tensor:
        """Compute what the weights' change since `before` does to the groups' losses, to first order: `[n]`."""
        change = [p.detach() - old for p, old in zip(self.layout.parameters, before, strict=True)]
        return self._as_means(compute_gramian(*self.lists, change).sum(dim=0)[: len(self.groups), -1])

    def _as_means(self, numbers: Tensor) -> Tensor:
        """Turn numbers `[..., n]` about the gradients as they are into those of the means over the window."""
        if all(share == 1 for share in self.shares):
            return numbers
        return numbers / self.layout.vector(self.shares).to(numbers)
