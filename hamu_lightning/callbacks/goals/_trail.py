"""Losses of training batches, which only hint how far the loss of a set has come since it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Losses of batches are smoothed over so many.
_WINDOW = 5


class Trail:
    """Adds the rise of batch losses to the level that was measured; nothing is read on the host.

    Batches run in the mode that the module trains in, where dropout makes their losses higher than the level, and they
    are noisy: so only their rise since the measurement is used, and only to tell when to measure again.
    """

    def __init__(self) -> None:
        self._mean: Tensor | None = None
        self._count = 0
        self._mean_then: Tensor | None = None
        self._level: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        """Take the loss of a batch in, 0-d; one that is not finite says nothing."""
        loss = loss.detach()
        self._count += 1
        mean = loss if self._mean is None else torch.where(self._mean.isfinite(), self._mean, loss)
        self._mean = torch.where(loss.isfinite(), mean + (loss - mean) / min(self._count, _WINDOW), mean)
        if self._mean_then is None:
            self._mean_then = self._mean

    def mark(self, level: Tensor) -> None:
        """Note a level that was measured at the present weights."""
        self._level, self._mean_then = level, self._mean

    @property
    def level(self) -> Tensor | None:
        """What was measured last."""
        return self._level

    @property
    def estimate(self) -> Tensor | None:
        """The level and what batch losses have risen by since; None before a measurement."""
        if self._level is None or self._mean is None or self._mean_then is None:
            return self._level
        return self._level + (self._mean - self._mean_then).to(self._level)

    def state_dict(self) -> dict[str, Any]:
        """Return the means in tensors."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        for name in state:
            setattr(self, name, state[name])


_STATE = ("_mean", "_count", "_mean_then", "_level")
