"""Whether weights have moved: at the end of a fit (steps may be rounded away, or taken back), and by others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from hamu_lightning.optim import HAMUOptimizer

# Of a tensor so many weights are looked at, at equal distances.
_MOST = 2**16


class Movement:
    """Compares weights at the end of a fit with those at its start.

    Args:
        trainer: The trainer.
        optimizer: What moves the weights.
    """

    def __init__(self, trainer: Trainer, optimizer: HAMUOptimizer) -> None:
        self._trainer = trainer
        tensors = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._before = [(p, look_at(p)) for p in tensors]

    def describe(self) -> str:
        """That nothing has moved, in words; empty where something has. All processes find the same."""
        is_still = not any(has_moved(before, look_at(p)) for p, before in self._before)
        if not self._trainer.strategy.reduce_boolean_decision(is_still, all=True):
            return ""
        seen, of = sum(before.numel() for _, before in self._before), sum(p.numel() for p, _ in self._before)
        which = "No weight" if seen == of else f"None of {seen} weights, spread over all {of},"
        return f"{which} has moved by more than its rounding in this fit: the model is what it was"


def look_at(parameter: Tensor) -> Tensor:
    """Some of a tensor's weights, or of its shard of this process, as a copy in host memory."""
    tensor = getattr(parameter, "to_local", lambda: parameter)().detach().reshape(-1)
    return tensor[:: max(1, -(-tensor.numel() // _MOST))].to("cpu", copy=True)


def is_same(before: Tensor, now: Tensor) -> bool:
    """Whether weights are the same numbers; what was none may be any other that is none."""
    return bool(((before == now) | ((before != before) & (now != now))).all())


def has_moved(before: Tensor, now: Tensor) -> bool:
    """Whether weights have moved by more than their rounding; coarse ones by a single number.

    Example:
        >>> weight = torch.ones(1)
        >>> has_moved(weight, weight + 1e-7), has_moved(weight, weight + 1e-6)
        (False, True)
    """
    if before.dtype.itemsize < 4:
        return not torch.equal(before, now)
    wide = torch.complex128 if before.is_complex() else torch.float64
    distance = torch.linalg.vector_norm(now.to(wide) - before.to(wide))
    return not bool(distance <= torch.finfo(before.dtype).eps * torch.linalg.vector_norm(before.to(wide)))
