"""What moves the weights: the base optimizer, or plain SGD at its learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from hamu_lightning.errors import HAMUStateError
from hamu_lightning.optim._checks import is_plain_sgd
from hamu_lightning.optim._mask import Mask


@dataclass
class Applier:
    """Applies gradients to weights.

    Args:
        base: The optimizer that is wrapped.
        exact: Whether plain SGD stands in for it, with the same tensors and learning rates.
    """

    base: Optimizer
    exact: bool = False
    _plain: Optimizer | None = field(default=None, init=False)
    _has_moved: bool = field(default=False, init=False)

    @property
    def moves_by_d(self) -> bool:
        """Whether the weights move by the rule's step, and so follow its radius; Adam's and momentum's do not."""
        return self.exact or is_plain_sgd(self.base)

    def choose(self, *, takes_d: bool) -> Optimizer:
        """Return what moves the weights: the base, or (`exact`) plain SGD, at rate 1 where its gradient is `-d`."""
        if not self.exact:
            return self.base
        known = [] if self._plain is None else [[*map(id, group["params"])] for group in self._plain.param_groups]
        groups = self.base.param_groups
        if self._plain is None or known != [[*map(id, group["params"])] for group in groups]:
            self._plain = SGD([{"params": list(group["params"])} for group in groups], lr=0.0)
        for plain, group in zip(self._plain.param_groups, groups, strict=True):
            plain["lr"] = 1.0 if takes_d else group["lr"]
        return self._plain

    def move_(self, optimizer: Optimizer, mask: Mask | None, parameters: Sequence[Tensor]) -> None:
        """Let an optimizer move the weights; those outside of the mask rest, whatever it does on its own.

        Raises:
            HAMUStateError: If it cannot make its first step from `.grad` alone.
        """
        try:
            apply_(optimizer, mask, parameters)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._has_moved:
                raise
            raise HAMUStateError(
                f"Expected {type(optimizer).__name__} to step on what `.grad` holds, without a closure, but its first "
                f"step raised {type(error).__name__}. An optimizer that evaluates the loss by itself (SAM), or reads "
                "gradients elsewhere, cannot be given a combined one. Use SGD, AdamW or another first-order optimizer, "
                "or `exact=True`, which takes the learning rates from it and nothing else."
            ) from error
        self._has_moved = True


def apply_(optimizer: Optimizer, mask: Mask | None, parameters: Sequence[Tensor]) -> None:
    """Step, and put the weights outside of the mask back."""
    if mask is None or is_plain_sgd(optimizer):  # which moves nothing where the gradient is zero
        optimizer.step()
    else:
        with mask.holding(parameters):
            optimizer.step()
