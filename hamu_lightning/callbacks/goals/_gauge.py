"""Measures levels beside a fit: targets, and the mean loss of a set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hamu_lightning.callbacks.goals._reading import Excerpt, Reader, find_not_finite
from hamu_lightning.callbacks.passes import ForgetPass, MeasuringLoader
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.gramian import widest_float

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Gauge:
    """Measures levels in evaluation mode and without a trace; all processes get the same number.

    Args:
        trainer: The trainer.
        forget_pass: What runs batches through the module.
        reader: Opens data.
        target: What is named in errors.
    """

    def __init__(self, trainer: Trainer, forget_pass: ForgetPass, reader: Reader, target: Any) -> None:
        self._trainer, self._forget_pass, self._reader, self._target = trainer, forget_pass, reader, target

    def measure(self, level_of: Callable[..., Any], *step: Any) -> Tensor:
        """What a function of the module, of what gives mean losses, and of a retain batch returns, 0-d.

        Args:
            level_of: The function, as `Target.measure`.
            step: What runs a batch, and the arguments of the retain batch.

        Raises:
            HAMUStateError: If it is not one number.
        """
        strategy = self._trainer.strategy

        def read(module: Any, mean_loss: Callable[[Iterable[Any]], Tensor], batch: Any) -> Any:
            def mean(data: Any) -> Tensor:
                return mean_loss(data if isinstance(data, MeasuringLoader | Excerpt) else self._reader.open(data))

            return level_of(module, mean, batch)

        level = self._forget_pass.measure(read, *step)
        if level.numel() != 1:
            raise HAMUStateError(f"Expected {self._target} to be one number, but got {level}.")
        level = level.reshape(()).to(strategy.root_device, widest_float(strategy.root_device))
        # Processes may have summed in different orders; they have to decide alike.
        return strategy.reduce(level, reduce_op="mean")

    def mean_loss(self, batches: Iterable[Any], *step: Any) -> Tensor:
        """The mean loss over batches, 0-d: as any target is measured, so that both are in one unit."""
        return self.measure(lambda module, mean_loss, batch: mean_loss(batches), *step)

    def find_not_finite(self, data: Any, *step: Any) -> str:
        """Which samples of some data have no finite loss, in words; empty where that is not known."""
        return find_not_finite(self._forget_pass, self._reader.find(data), step)
