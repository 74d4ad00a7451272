"""The forget gradient under a loss scaler (16-bit mixed precision)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD

from hamu_lightning.errors import HAMUStateError


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


class Unscalings:
    """The unscalings of the step that a loss scaler has begun: one for each group with a new gradient."""

    def __init__(self) -> None:
        self._all: list[Unscaling] = []

    def __getstate__(self) -> dict[str, object]:
        """A copy does not take part in the step."""
        return {"_all": []}

    def add(self, unscaling: Unscaling) -> None:
        """Take one in."""
        self._all.append(unscaling)

    def clear(self) -> None:
        """Forget all of them."""
        self._all = []

    @property
    def is_over(self) -> bool:
        """Whether there is a step, and the scaler's `update()` has ended it."""
        return bool(self._all) and self._all[0].is_over

    def is_stale(self, grad: Tensor | None) -> bool:
        """Whether a retain gradient was there already when the first forget gradient was unscaled."""
        return self._all[0].is_stale(grad)

    def mark_overflow(self, gramian: Tensor) -> Tensor:
        """Return the Gramians, all NaN where a forget gradient overflowed.

        Clipping by value would hide an overflow from the rule, although the scaler backs off.
        """
        for unscaling in self._all:
            if unscaling.found_inf is not None:
                gramian = gramian.masked_fill(unscaling.found_inf.to(gramian.device), torch.nan)
        return gramian

    def check_can_begin(self, has_gradient: bool) -> None:
        """Raise unless there is a forget gradient, and it is not unscaled yet."""
        if self._all:
            raise HAMUStateError(
                "Expected one `unscale_forget_` per step, but the forget gradient is unscaled already. "
                "Call `scaler.step(optimizer)` and `scaler.update()` first."
            )
        if not has_gradient:
            raise HAMUStateError(
                "Expected a forget gradient to unscale, but there is none. Call `unscale_forget_` after "
                "`with optimizer.forget(): scaler.scale(loss).backward()` and before `scaler.step(optimizer)`."
            )


def unscale_unseen_(scaler: torch.amp.GradScaler, parameters: Sequence[Tensor]) -> None:
    """Divide gradients by the loss scale, unseen by the scaler: neither its step nor its scale takes notice.

    For gradients that are looked at but not applied, such as those of a measurement between two steps.

    Args:
        scaler: The loss scaler, enabled.
        parameters: Tensors whose `.grad` holds the gradients.
    """
    Unscaling(scaler, parameters, [], tells=False)
