"""The mean loss over a whole pass of a stream, as it was seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class PassMean:
    """Sums up the losses of each pass; nothing is read on the host.

    Attributes:
        mean: 0-d, over the last pass that has ended; None before.
    """

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self._pass: int | None = None
        self._total: Tensor | None = None
        self._count = 0

    def add(self, loss: Tensor, number: int) -> None:
        """Take the loss of a batch in.

        Args:
            loss: 0-d.
            number: Which pass it belongs to.
        """
        if self._total is not None and number != self._pass:
            self.mean = self._total / self._count
            self._total, self._count = None, 0
        self._pass = number
        self._total = loss.detach().double() if self._total is None else self._total + loss.detach()
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, in tensors and numbers; empty before the first batch."""
        return {} if self._pass is None else {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        for name in state:
            setattr(self, name, state[name])


_STATE = ("mean", "_pass", "_total", "_count")
