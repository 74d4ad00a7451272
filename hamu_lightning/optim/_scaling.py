"""The forget gradient under a loss scaler (16-bit mixed precision)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD


class Unscaling:
    """One unscaling of the forget gradient, from `unscale_` to the scaler's `update()`.

    A scaler unscales an optimizer once per step; an optimizer of its own stands for the forget slot.

    Args:
        scaler: The loss scaler, enabled.
        parameters: Tensors whose `.grad` points at the forget gradient now.
        retain: The retain gradients of this step.
        tells: Whether an overflow here makes the scaler back off and the step leave itself out.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler, parameters: Sequence[Tensor], retain: Sequence[Tensor | None], tells: bool
    ) -> None:
        self._scaler = scaler
        self._retain = {id(grad): weakref.ref(grad) for grad in retain if grad is not None}
        self._shadow = SGD(parameters, lr=0.0)  # the scaler knows it by its id until `update()`: it has to live
        scaler.unscale_(self._shadow)
        # `update()` puts a new dict in this one's place, and backs off if any optimizer in it met an overflow:
        # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/amp/grad_scaler.py
        self._states = scaler._per_optimizer_states
        found = self._states[id(self._shadow)]["found_inf_per_device"].values()
        self.found_inf = torch.stack([flag.to(parameters[0].device) for flag in found]).any() if tells else None
        if not tells:
            del self._states[id(self._shadow)]

    @property
    def is_over(self) -> bool:
        """Whether the scaler's `update()` has ended the step that this belongs to."""
        return self._scaler._per_optimizer_states is not self._states

    def is_stale(self, grad: Tensor | None) -> bool:
        """Whether a retain gradient was there already when the forget gradient was unscaled."""
        return grad is not None and id(grad) in self._retain and self._retain[id(grad)]() is grad
