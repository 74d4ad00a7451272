"""The loss of one stream, and how far it has come."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class Objective(NamedTuple):
    """The state of an objective: its mean loss, and the change since the start, in loss units, 0-d each."""

    loss: Tensor
    change: Tensor


class RunningObjective(Metric):
    """Mean loss of a stream over a window of batches, and its change since the first window.

    `close_window()` ends a window: the first window's mean is the start that `change` counts from. With the forget
    stream a positive change is an improvement, with the retain stream a negative one. A NaN loss gives NaN, never 0.

    Example:
        >>> objective = RunningObjective()
        >>> objective.update(torch.tensor(2.0))
        >>> objective.close_window()
        tensor(2.)
        >>> objective.update(torch.tensor(5.0), batch_size=1)
        >>> objective.update(torch.tensor(1.0), batch_size=3)
        >>> objective.compute()
        Objective(loss=tensor(2.), change=tensor(0.))
    """

    full_state_update = False
    total: Tensor
    count: Tensor
    start: Tensor | None
    """Mean loss of the first window, once it is closed."""
    latest: Tensor | None
    """Mean loss of the last closed window."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")
        self.start: Tensor | None = None
        self.latest: Tensor | None = None

    @override
    def update(self, loss: Tensor, batch_size: int | Tensor = 1) -> None:
        """Add the mean loss of a batch, weighted by its number of samples."""
        self.total = self.total + loss.detach() * batch_size
        self.count = self.count + batch_size

    @override
    def compute(self) -> Objective:
        """Return the mean loss of the window (NaN without a batch) and its change since the first window."""
        loss = self.total / self.count
        return Objective(loss, loss - (loss if self.start is None else self.start.to(loss.device)))

    def close_window(self) -> Tensor:
        """Return the mean loss of the window, remember it, and begin the next one. An empty window is not counted."""
        loss = self.compute().loss
        if self.update_called:
            self.latest = loss
            self.start = loss if self.start is None else self.start
        self.reset()
        return loss
