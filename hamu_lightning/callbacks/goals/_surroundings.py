"""Targets that bring an answer, and what is around them at the start of a fit: all the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from hamu_lightning.callbacks._refusal import HAMUMisconfigurationError
from hamu_lightning.callbacks.goals._reading import Reader, undivided
from hamu_lightning.callbacks.goals._targets import Target
from hamu_lightning.callbacks.passes import MeasuringLoader, read_labels, with_objective
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives import AnswerObjective, ClassReader, Objective

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Surroundings:
    """Reads data beside a fit, each process all of them.

    Args:
        trainer: The trainer, with its loaders set up.
        reader: Opens held-out data.
        given: The loader of what is to be forgotten, as the user gave it.
        protected: The loaders of the protected groups: their classes stay as well.
        measure: Gives a level, as for `Target.measure`, with a step.
        step: Runs a batch of what is to be forgotten, with the arguments of the retain batch.

    Attributes:
        forget: The batches of what is to be forgotten, read beside the fit.
        held_out: The loader of held-out data, once it has been opened; None before.

    Raises:
        HAMUMisconfigurationError: If these cannot be read beside it.
    """

    def __init__(
        self,
        trainer: Trainer,
        reader: Reader,
        given: Any,
        protected: Sequence[Any],
        measure: Callable[..., Tensor],
        step: tuple[Any, ...],
    ) -> None:
        self._trainer, self._reader, self._given, self._protected = trainer, reader, given, protected
        self._measure, self._step = measure, step
        self.forget = self._open_forget()
        self.held_out: Any = None

    def run(self, objective: Objective, batches: Iterable[Any]) -> Tensor:
        """The mean of an objective over batches, 0-d."""
        step, *args = self._step
        return self._measure(lambda module, mean, batch: mean(batches), with_objective(step, objective), *args)

    def open_held_out(self, data: Any) -> Iterable[Any]:
        """The batches of held-out data, as for `Holdout`; the validation data, for None, are checked here."""
        self.held_out = self._reader.find_undivided(data, "Unseen")
        if data is None:
            self._reader.take_held_out(self.held_out, self._given, None)
        return self._reader.open(self.held_out)

    def count_retained(self, forget: ClassReader) -> Tensor:
        """How many samples of each class stay, in the retain data and the protected groups, int64 `[C]`.

        Labels of datasets count where they can be read, and those of the forget set are what was read of it; else a
        pass over the data is made.

        Args:
            forget: What was read of the forget set.

        Raises:
            HAMUMisconfigurationError: If the data cannot be read.
        """
        own = read_labels(self._given)
        are_labels = own is not None and torch.equal(own.sort().values, forget.labels.sort().values)
        kept = (self._reader.find_retain(), *self._protected)
        counts = [self._count(undivided(data), forget, are_labels) for data in kept]
        return torch.stack(counts).sum(0)

    def agree(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of the first process: others may have rounded differently."""
        agreed: dict[str, Any] = self._trainer.strategy.broadcast(state)
        return agreed

    def _open_forget(self) -> MeasuringLoader:
        try:
            return MeasuringLoader(self._given)
        except HAMUValueError as error:
            raise HAMUMisconfigurationError(
                f"Expected data to forget that can be read before the first step, but they cannot: {error}"
            ) from error

    def _count(self, data: Any, forget: ClassReader, are_labels: bool) -> Tensor:
        """How many samples of each class a loader has; `are_labels`: what a Dataset names are those of the loss."""
        labels = read_labels(data) if are_labels else None
        if labels is not None and int(labels.min()) >= 0 and int(labels.max()) < forget.classes:
            return torch.bincount(labels, minlength=forget.classes)
        return self._count_by_pass(data, forget)

    def _count_by_pass(self, data: Any, forget: ClassReader) -> Tensor:
        reader = forget.for_labels()
        try:
            batches = MeasuringLoader(data)
            if batches.length is None:
                raise HAMUValueError("a stream has no end that is known")
        except HAMUValueError as error:
            raise _refuse(error) from error
        try:
            self.run(reader, batches)
        finally:
            batches.close()
        return reader.count()


class AnswerTarget(Target):
    """A target that brings what is raised: from 0 towards an answer, of which 95 % are to come true."""

    what: ClassVar[str] = "progress to the answer (nats)"
    by_objective: ClassVar[bool] = True
    objective: AnswerObjective

    @override
    def measure(self, module: nn.Module, mean_loss: Callable[[Iterable[Any]], Tensor], batch: Any) -> Tensor | float:
        """Not used: the end is measured by `prepare`."""
        raise NotImplementedError

    def prepare(self, around: Surroundings) -> Tensor:
        """Measure what the answers depend on, and return how far it is to them, 0-d in nats."""
        return around.run(self.objective.end, around.forget)


def _refuse(error: Exception) -> HAMUMisconfigurationError:
    return HAMUMisconfigurationError(
        "Expected to count how many samples of each class stay, for Unseen(), but the retain data cannot be read "
        f"beside the fit: {error}. Say it: Unseen(counts={{3: 0, 5: 400}}), for each class of the forget set how many "
        "samples of it are retained."
    )
