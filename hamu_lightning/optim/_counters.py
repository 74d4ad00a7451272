"""What became of the combined steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SAVED = ("steps", "zero_lr_steps", "not_finite_steps", "rejected_steps", "dropped_steps", "undone_steps")


@dataclass
class Counters:
    """How many steps there were of each kind; see the properties of `CountedSteps`."""

    calls: int = 0
    steps: int = 0
    zero_lr_steps: int = 0
    not_finite_steps: Tensor | int = 0
    rejected_steps: int = 0
    dropped_steps: int = 0
    undone_steps: int = 0

    def state_dict(self) -> dict[str, int]:
        """Return the counts of combined steps."""
        return {name: int(getattr(self, name)) for name in _SAVED}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; what is not in it begins at 0."""
        for name in _SAVED:
            setattr(self, name, state_dict.get(name, 0))


class CountedSteps:
    """The counters of an optimizer, as its users see them."""

    @property
    @abstractmethod
    def _counters(self) -> Counters: ...

    @property
    def steps(self) -> int:
        """How many combined steps were asked for by `step()`, the left-out ones included."""
        return self._counters.steps

    @property
    def calls(self) -> int:
        """How many times `step()` was called, whatever it was to do."""
        return self._counters.calls

    @property
    def applied_steps(self) -> Tensor:
        """How many combined steps have moved the weights: 0-d, on the device."""
        count = self._counters
        return count.steps - count.zero_lr_steps - count.rejected_steps - count.undone_steps - self.not_finite_steps

    @property
    def left_out_steps(self) -> Tensor:
        """How many combined steps came to nothing: not finite, learning rate 0, dropped, undone. 0-d, on the device."""
        count = self._counters
        return count.zero_lr_steps + count.dropped_steps + count.undone_steps + self.not_finite_steps

    @property
    def zero_lr_steps(self) -> int:
        """How many steps found every learning rate at 0 and did nothing."""
        return self._counters.zero_lr_steps

    @property
    def not_finite_steps(self) -> Tensor:
        """How many steps were left out because of a non-finite number: 0-d, on the device."""
        return torch.as_tensor(self._counters.not_finite_steps)

    @property
    def dropped_steps(self) -> int:
        """How many combined steps came to nothing before the rule was asked: no retain loss, or a scaler's overflow."""
        return self._counters.dropped_steps

    @property
    def undone_steps(self) -> int:
        """How many combined steps the referee gave up."""
        return self._counters.undone_steps
