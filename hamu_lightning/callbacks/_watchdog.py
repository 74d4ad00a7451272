"""Notices when weights move without us: forgetting must never silently not happen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hamu_lightning.callbacks import _compat
from hamu_lightning.errors import HAMUStateError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from hamu_lightning.optim import HAMUOptimizer


class Watchdog:
    """Compares, window by window, what has moved the weights with what should have.

    Until the first call of `step()` the weights are compared by value: version counters do not show writes through
    `.data`. The copies are in host memory. From then on it is the optimizer, and the version counters, that are looked
    at.

    Args:
        trainer: The trainer.
        optimizer: What the weights should move through.
    """

    def __init__(self, trainer: Trainer, optimizer: HAMUOptimizer) -> None:
        self._trainer, self._optimizer = trainer, optimizer
        self._watched = [(p, p.detach().to("cpu", copy=True)) for p in self._parameters if p.requires_grad]
        self._calls, self._versions = optimizer.calls, self._count_writes()

    def check_optimizer(self) -> None:
        """Raise if the trainer has another optimizer than the one that unlearning began with."""
        if self._trainer.optimizers[0] is not self._optimizer:
            raise HAMUStateError(
                f"Expected the optimizer of the start in the whole fit, but at step {self._trainer.global_step} the "
                "Trainer has another one: its steps would be plain training, and nothing would be forgotten any more. "
                "Change the one that is there (`add_param_group`, learning rates), or begin another fit."
            )

    def check_window(self, *, had_passes: bool) -> None:
        """At the end of a window, raise if weights have moved although `step()` was not called.

        Args:
            had_passes: Whether forget passes ran in the window, for a combined step.
        """
        before, self._calls = self._calls, self._optimizer.calls
        versions, self._versions = self._versions, self._count_writes()
        if self._calls == 0:
            self._check_values()
            return
        self._watched = []
        # A loss scaler leaves out steps by itself.
        is_missing = had_passes and self._calls == before and _compat.grad_scaler(self._trainer) is None
        if is_missing and self._versions != versions:
            raise HAMUStateError(
                f"Expected a combined step after the forget passes, but by step {self._trainer.global_step} the "
                "weights have moved without HAMUOptimizer. Let `optimizer_step` call `optimizer.step(closure=...)` on "
                "the optimizer that it is given."
            )

    def _check_values(self) -> None:
        if any(not torch.equal(p.detach().cpu(), copy) for p, copy in self._watched):
            raise HAMUStateError(
                "Expected the weights to move through HAMUOptimizer only, but they moved before its first step. The "
                "module seems to step by itself (inside `training_step`, or through the raw optimizer): use "
                "HAMUOptimizer there, see the recipe for manual optimization."
            )

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _count_writes(self) -> int:
        return sum(p._version for p in self._parameters)
