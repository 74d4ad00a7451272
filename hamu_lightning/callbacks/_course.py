"""What the loss of one group did in a fit, beside what the steps promised."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from hamu_lightning.gramian import widest_float
from hamu_lightning.metrics import RunningObjective

# The loss at an end of the fit is the mean over so many batches, and at most over a tenth of them: it may rise fast.
_AT_AN_END = 10
# Promised and measured rise have parted where less than this share came, and noise does not explain it: so many
# standard errors.
_SHARE, _ERRORS = 1 / 3, 4.0


class Course:
    """Follows the loss of a group; nothing is read on the host.

    Args:
        device: Where the losses are.

    Attributes:
        windows: Means between logging steps, and the start of the run that this fit may continue.
        batches: How many batches there were in this fit.
    """

    def __init__(self, device: torch.device) -> None:
        self.windows = RunningObjective().to(device)
        self.batches = 0
        self._first: list[Tensor] = []
        self._last: deque[Tensor] = deque(maxlen=_AT_AN_END)
        self._promised = torch.zeros((), dtype=widest_float(device), device=device)
        self._epoch = self._promised.new_zeros(2)  # sum and number

    def add(self, loss: Tensor) -> None:
        """Take the loss of a batch in."""
        loss = loss.detach()
        self.windows.update(loss)
        self.batches += 1
        if len(self._first) < _AT_AN_END:
            self._first.append(loss)
        self._last.append(loss)
        self._epoch = self._epoch + torch.stack((loss.to(self._epoch), torch.ones_like(self._epoch[0])))

    def add_promise(self, rise: Tensor, *, moved: Tensor) -> None:
        """Take in what a step promised; `moved`, 0-d, is 0 where it moved nothing."""
        moved = moved.to(rise.device)
        self._promised = self._promised + torch.where(moved > 0, rise, 0).to(self._promised)

    def end_epoch(self) -> Tensor:
        """Return the sum and the number of the epoch's losses, `[2]`, and begin the next one."""
        ended, self._epoch = self._epoch, torch.zeros_like(self._epoch)
        return ended

    def numbers(self) -> Tensor:
        """`[5]`: the loss at the start and at the end of this fit, their squared errors, and the promised rise."""
        width = max(1, min(_AT_AN_END, self.batches // 10))
        ends = [self._first[:width], [*self._last][-width:]]
        if not self.batches:
            return self._promised.new_full((5,), torch.nan)
        losses = [torch.stack(end).to(self._promised) for end in ends]
        errors = [x.var() / width if width > 1 else x.new_full((), torch.nan) for x in losses]
        return torch.stack((*(x.mean() for x in losses), *errors, self._promised))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in tensors."""
        return {**self.windows.save(), "epoch": self._epoch.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        self.windows.load(state)
        self._epoch = state.get("epoch", self._epoch).to(self._epoch)


def have_parted(start: float, end: float, start_error: float, end_error: float, promised: float) -> bool:
    """Whether the measured rise is far less than the promised one, beyond noise; see `Course.numbers`."""
    missing = promised - (end - start)
    noise = (start_error + end_error) ** 0.5
    return promised > 0 and end - start < _SHARE * promised and missing > _ERRORS * noise
