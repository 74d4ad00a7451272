"""Weights of an earlier step, to go back to."""

from __future__ import annotations

import torch
from torch import Tensor

from hamu_lightning.optim import HAMUOptimizer


class KeptWeights:
    """A copy of the weights that an optimizer trains, where they are.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: HAMUOptimizer) -> None:
        self._optimizer = optimizer
        self._kept: list[tuple[Tensor, Tensor]] = []

    def keep(self) -> None:
        """Copy the present weights, in place of those that were kept before."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._kept = [(p, p.detach().clone()) for p in parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the kept weights; without any the weights stay."""
        for parameter, copy in self._kept:
            parameter.copy_(copy)
