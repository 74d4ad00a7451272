"""A pass without a Trainer that leaves nothing behind but its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from hamu_lightning.callbacks import _compat, _compat_loaders
from hamu_lightning.callbacks.passes._forget_pass import check_loss
from hamu_lightning.callbacks.passes._guard import ModuleGuard
from hamu_lightning.callbacks.passes._loaders import twin_loader
from hamu_lightning.callbacks.passes._streams import ForgetStream
from hamu_lightning.checks import check_choice
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.loaders import transfer_by_hooks
from hamu_lightning.randomness import RandomStream


class BarePass:
    """Runs batches through `training_step` without a Trainer, and leaves nothing behind but the gradient.

    Args:
        module: The module.
        loader: Its batches.
        name: What the loader is called in errors.
        guard: Keeps the module as it was.
        random: The random numbers of the pass.
        slot: A context in which `backward()` accumulates.

    Attributes:
        samples: How many samples the last batch had; NaN where that cannot be told.
    """

    samples = math.nan

    def __init__(
        self,
        module: Any,
        loader: Iterable[Any],
        name: str,
        guard: ModuleGuard,
        random: RandomStream,
        slot: Callable[[], Any],
    ) -> None:
        if not isinstance(loader, Iterable):
            raise HAMUValueError(
                f"Expected `{name}_loader` to be a DataLoader or another iterable of batches, but got "
                f"{type(loader).__name__}. A Dataset becomes one by DataLoader(dataset, batch_size=...)."
            )
        self.stream = ForgetStream(twin_loader(_compat_loaders.without_indices(loader)), random)
        if self.stream.length == 0:
            raise HAMUValueError(f"Expected `{name}_loader` to hold at least one batch, but it is empty.")
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._module, self._name, self._guard, self._random, self._slot = module, name, guard, random, slot

    def run(self) -> Tensor:
        """Run the next batch that gives a loss."""
        for _ in range(self.stream.length or 100):
            loss = self.run_next()
            if loss is not None:
                return loss
        raise HAMUStateError(
            f"Expected `training_step` to return a loss, but it returned None for all {self._name} data."
        )

    def run_next(self) -> Tensor | None:
        """Run the next batch, and return its loss, if it gives one."""
        self._random.draw += 1
        with self._random.active(), self._guard.guarding(), without_trainer(self._module):
            batch = _transfer(self._module, next(self.stream), self._device)
            self.samples = self.stream.samples
            arguments = _compat.step_arguments(self._module, batch, self._random.draw - 1)
            loss: Any = _compat.split_step_output(self._module.training_step(*arguments))
            if loss is None:
                return None
            check_loss(loss)
            with self._slot():
                torch.autograd.backward(loss)
            detached: Tensor = loss.detach().float().mean().clone()
            return detached


_NEEDS_TRAINER = (
    "Use HAMUCallback(preflight=True), which measures the same at the start of the fit; or, where only "
    "`configure_optimizers` asks, pass `lr`."
)


@contextmanager
def without_trainer(module: Any, cure: str = _NEEDS_TRAINER) -> Iterator[None]:
    """Let `self.log` do nothing, and say what to do where the module needs its Trainer.

    To be used inside `ModuleGuard.guarding()`, which puts the attributes back.
    """
    vars(module).update({name: _log_nothing for name in ("log", "log_dict") if hasattr(module, name)})
    try:
        yield
    except RuntimeError as error:
        # lightning/pytorch/core/module.py `trainer`
        if "attached to a `Trainer`" not in str(error):
            raise
        raise HAMUStateError(f"Expected the module to work without a Trainer, but it asks for one. {cure}") from error


def _log_nothing(*_: Any, **__: Any) -> None:
    pass


def check_module(module: Any, batchnorm: str) -> None:
    """Raise unless batches can be run through the module."""
    if not callable(getattr(module, "training_step", None)):
        raise HAMUValueError(
            f"Expected `module` to have a `training_step(batch)` that returns the loss, but {type(module).__name__} "
            "has none. Give the LightningModule, or add such a method."
        )
    if not getattr(module, "automatic_optimization", True):
        raise HAMUValueError(
            "Expected automatic optimization, but the module sets `automatic_optimization = False`: its "
            "`training_step` would change the weights. Give a module whose `training_step` only returns the loss."
        )
    check_choice("batchnorm", batchnorm, ("freeze", "retain"))


def _transfer(module: Any, batch: Any, device: torch.device) -> Any:
    """Send a batch to a device by the module's own hooks where it has them."""
    if not hasattr(module, "transfer_batch_to_device"):
        return move_data_to_device(batch, device)
    return transfer_by_hooks(module, batch, device)
