"""The loss of one stream, and how far it has come."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from hamu_lightning.checks import check_count, check_number, check_optional, describe
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics._base import HAMUMetric
from hamu_lightning.metrics._dtype import state_float
from hamu_lightning.metrics.functional import as_numbers


class Objective(NamedTuple):
    """The state of an objective: its mean loss, and the change since the start, in loss units, 0-d each."""

    loss: Tensor
    change: Tensor


class RunningObjective(HAMUMetric):
    """Mean loss of a stream over a window of batches, and its change since the start.

    Each batch counts by its number of samples. `close_window()` ends a window; the start is the mean of the first
    window that holds a batch, or the argument `start`. With the forget stream a positive change is an improvement, with
    the retain stream a negative one. A NaN loss gives NaN, never 0: in the first window it makes every change NaN.
    `reset` ends a window without counting it; the start stays. Across processes sums are added up, so that all
    processes have the same start; call `close_window` and `compute` on all of them.

    Args:
        start: The loss that `change` counts from, in loss units, for instance one measured before training. Default:
            the mean loss of the first window.
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If `start` is no number, or an option unknown.

    Example:
        >>> import torch
        >>> from hamu_lightning.metrics import RunningObjective
        >>> objective = RunningObjective()
        >>> objective.update(torch.tensor(2.0))
        >>> objective.close_window()
        tensor(2., dtype=torch.float64)
        >>> objective.update(torch.tensor(5.0), batch_size=3)
        >>> objective.update(torch.tensor(1.0), batch_size=1)
        >>> objective.compute()
        Objective(loss=tensor(4., dtype=torch.float64), change=tensor(2., dtype=torch.float64))
    """

    total: Tensor
    count: Tensor

    def __init__(self, start: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        start = check_optional(check_number, "start", start)
        wide = state_float()
        self.add_state("total", torch.zeros((), dtype=wide), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        # Flags beside the numbers instead of None: whether a window was empty is known on the device alone.
        self._start = torch.tensor(math.nan if start is None else start, dtype=wide)
        self._has_start = torch.tensor(start is not None)
        self._latest = torch.tensor(math.nan, dtype=wide)
        self._has_latest = torch.tensor(False)

    @property
    def start(self) -> Tensor | None:
        """The loss that `change` counts from; None before it is known. Reads the host."""
        return self._start if self._has_start else None

    @property
    def latest(self) -> Tensor | None:
        """Mean loss of the last closed window that held a batch; None if there was none. Reads the host."""
        return self._latest if self._has_latest else None

    @override
    def update(self, loss: Tensor, batch_size: int | Tensor = 1) -> None:
        """Add the mean loss of a batch. Nothing is read on the host.

        Args:
            loss: One number, the mean over the samples of the batch.
            batch_size: Number of samples (or tokens, where the loss is a mean over tokens). Leave empty batches out.

        Raises:
            HAMUValueError: If `loss` is more than one number, or `batch_size` is not a positive whole number.
        """
        loss = as_numbers("loss", loss, self.device)
        if loss.numel() != 1:
            raise HAMUValueError(
                f"Expected `loss` to be one number, but got shape {list(loss.shape)}. "
                "Give the mean over the batch, and its number of samples as `batch_size`."
            )
        if not isinstance(batch_size, Tensor):
            batch_size = check_count("batch_size", batch_size, cure="Leave empty batches out.")
        elif batch_size.numel() != 1 or batch_size.is_floating_point() or batch_size.is_complex():
            raise HAMUValueError(
                f"Expected `batch_size` to be a positive whole number, but got {describe(batch_size)}. "
                "Leave empty batches out."
            )
        # Widened first: a float16 loss times a number of tokens overflows.
        self.total = self.total + loss.to(self.total.dtype).reshape(()) * batch_size
        self.count = self.count + batch_size

    @override
    def compute(self) -> Objective:
        """Return the mean loss of the window (NaN without a batch) and its change since the start.

        In the first window, without an explicit `start`, the change is 0.
        """
        loss = self.total / self.count
        start, has_start = self._start.to(loss.device), self._has_start.to(loss.device)
        return Objective(loss, loss - torch.where(has_start, start, loss))

    def close_window(self) -> Tensor:
        """Return the mean loss of the window of all processes, remember it, and begin the next one.

        A window without a batch gives NaN and is not remembered. Nothing is read on the host.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            loss, is_counted = self.total / self.count, self.count > 0
        is_start = is_counted & ~self._has_start.to(loss.device)
        self._start = torch.where(is_start, loss, self._start.to(loss.device))
        self._has_start = self._has_start.to(loss.device) | is_counted
        self._latest = torch.where(is_counted, loss, self._latest.to(loss.device))
        self._has_latest = self._has_latest.to(loss.device) | is_counted
        self.reset()
        return loss

    def save(self) -> dict[str, Tensor]:
        """Return the window so far, the start and the latest mean, for a checkpoint."""
        return {name: getattr(self, name).clone() for name in _SAVED}

    def load(self, saved: dict[str, Tensor]) -> None:
        """Go on with what `save` returned."""
        for name in _SAVED:
            setattr(self, name, saved[name].to(self.total.device))
        # torchmetrics keeps no state for `update_called`: without it a window that goes on would look empty.
        self._update_count = int(saved["count"] > 0)


_SAVED = ("total", "count", "_start", "_has_start", "_latest", "_has_latest")
