"""A look at a module: batches in evaluation mode without a trace, with a Trainer, in its fit, and without one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks.passes._bare_pass import without_trainer
from hamu_lightning.callbacks.passes._guard import ModuleGuard
from hamu_lightning.callbacks.passes._loaders import copied
from hamu_lightning.objectives import evaluating
from hamu_lightning.optim import hidden_gradients
from hamu_lightning.randomness import RandomStream

_NEEDS_TRAINER = "Measure it in a fit, with EvaluateUnlearning(), or attach the module to a Trainer."


class Look:
    """Runs batches through a module in evaluation mode, and leaves nothing behind.

    Put back are random numbers, buffers, weights, attributes, metrics, modes and gradients (`ModuleGuard`); nothing is
    logged. Batches take the transfer hooks of the datamodule, where it has them, and else of the module; while these
    run, an attached Trainer is one that validates. Its precision is that of the batches.

    Args:
        module: A LightningModule.
        datamodule: Default: that of the attached Trainer.
    """

    def __init__(self, module: Any, datamodule: Any = None) -> None:
        self._module, self._guard = module, ModuleGuard(module)
        self._trainer = getattr(module, "_trainer", None)
        self._datamodule = datamodule or getattr(self._trainer, "datamodule", None)
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))

    @contextmanager
    def open(self) -> Iterator[None]:
        """The context in which batches are run."""
        module, trainer = self._module, self._trainer
        with ExitStack() as stack:
            # All looks draw the same random numbers: what is still random in the data is the same before and after.
            stack.enter_context(RandomStream(0).active())
            stack.enter_context(self._guard.guarding())
            stack.enter_context(hidden_gradients(module.parameters()))
            stack.enter_context(evaluating(module))
            stack.enter_context(without_trainer(module, _NEEDS_TRAINER))
            # Some modules differentiate inside of their step.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if trainer is not None:
                stack.enter_context(_compat.silent_loggers(trainer))
                stack.enter_context(trainer.precision_plugin.train_step_context())
            yield
        self._guard.end_window()

    def transfer(self, batch: Any) -> Any:
        """A copy of a batch, sent to the module's device."""
        batch = copied(batch)
        if self._trainer is not None:
            batch = self._trainer.precision_plugin.convert_input(batch)
        with _compat.validating(self._trainer):
            batch = self._hook("on_before_batch_transfer")(batch, 0)
            batch = self._hook("transfer_batch_to_device")(batch, self._device, 0)
            return self._hook("on_after_batch_transfer")(batch, 0)

    @property
    def has_step(self) -> bool:
        """Whether the module has a `training_step` of its own."""
        return not _is_lightnings(self._module.training_step)

    def loss(self, batch: Any, index: int = 0) -> float:
        """The module's own loss of a batch that was transferred; NaN where its step gives none, or moves weights."""
        if not getattr(self._module, "automatic_optimization", True):
            return math.nan
        step = self._module.training_step
        loss: Any = _compat.split_step_output(step(*_compat.step_arguments(self._module, copied(batch), index)))
        return float(loss.detach().float().mean()) if isinstance(loss, Tensor) else math.nan

    def _hook(self, name: str) -> Any:
        """As lightning/pytorch/trainer/connectors/data_connector.py `_DataHookSelector` chooses it."""
        own = getattr(self._datamodule, name, None)
        return getattr(self._module, name) if own is None or _is_lightnings(own) else own


def _is_lightnings(method: Any) -> bool:
    """Whether a method is the default of Lightning."""
    return str(getattr(method, "__module__", "")).partition(".")[0] in ("lightning", "pytorch_lightning")
