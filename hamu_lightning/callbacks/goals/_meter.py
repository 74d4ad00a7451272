"""Measures loss and accuracy on an excerpt, in evaluation mode and without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hamu_lightning.callbacks.goals._retain_guard import Reading
from hamu_lightning.callbacks.passes import ForgetPass, MeasuringLoader, copied
from hamu_lightning.gramian import widest_float
from hamu_lightning.objectives import BatchPass, ModuleOutputs, evaluating

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Meter:
    """Runs an excerpt through the module; all processes get the same numbers.

    Args:
        trainer: The trainer.
        run: What runs batches through the module without a trace.
    """

    def __init__(self, trainer: Trainer, run: ForgetPass) -> None:
        self._trainer, self._run = trainer, run
        self._reads_predictions = True

    def measure(
        self, excerpt: MeasuringLoader, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Reading:
        """Measure an excerpt at the present weights; reads the host.

        Args:
            excerpt: The excerpt.
            step: The strategy's `training_step`, or an objective in its place.
            args: The arguments of the retain batch.
            kwargs: Likewise.
        """
        samples, counts = [], []

        def watched(batch: Any, *others: Any, **named: Any) -> Any:
            samples.append(excerpt.samples)
            counts.append(self._count_right(batch))
            return step(batch, *others, **named)

        def level(module: Any, mean_of: Callable[[Any], Tensor], _: Any) -> Tensor:
            with evaluating(module):
                return mean_of(excerpt)

        loss = self._run.measure(level, watched, (None, *args[1:]), kwargs)
        right, of = torch.stack(counts).sum(0)
        numbers = torch.stack((loss.to(right), right / of))  # NaN where there are none
        # Processes may have read different samples, or summed in different orders; they have to decide alike.
        numbers = self._trainer.strategy.reduce(numbers, reduce_op="mean")
        mean_loss, accuracy = numbers.tolist()
        return Reading(mean_loss, accuracy, sum(samples))

    def _count_right(self, batch: Any) -> Tensor:
        """`[2]`: how many labels of a batch are predicted, and of how many; 0 where predictions cannot be read."""
        counts = torch.zeros(2, dtype=widest_float(self._device), device=self._device)
        if not self._reads_predictions:
            return counts
        try:
            with torch.no_grad(), self._trainer.precision_plugin.forward_context():
                # A copy, since the module's own step comes after this one.
                found = BatchPass(self._trainer.lightning_module, copied(batch)).predict(ModuleOutputs())
        except Exception:  # of a module or a batch of another kind: there is no accuracy
            self._reads_predictions = False
            return counts
        if found.is_answer or found.logits.shape[-1] < 2:  # one number for each sample: it may be a regression
            self._reads_predictions = False
            return counts
        right = (found.logits.argmax(-1) == found.labels) & found.mask
        return torch.stack((right.sum(), found.mask.sum())).to(counts)

    @property
    def _device(self) -> torch.device:
        return self._trainer.strategy.root_device
