"""Measures levels beside a fit: targets, and the mean loss of a set, by the module's own loss whatever is raised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hamu_lightning.callbacks.goals._reading import Excerpt, Reader, find_not_finite
from hamu_lightning.callbacks.goals._surroundings import AnswerTarget, Surroundings
from hamu_lightning.callbacks.goals._targets import Target
from hamu_lightning.callbacks.passes import ForgetPass, MeasuringLoader, unwrap_step
from hamu_lightning.errors import HAMUError, HAMUStateError
from hamu_lightning.gramian import widest_float

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Gauge:
    """Measures levels in evaluation mode and without a trace; all processes get the same number.

    Args:
        trainer: The trainer.
        forget_pass: What runs batches through the module.
        reader: Opens data.
        target: What is to be reached: it says what levels are of, and is named in errors.
        protected: The loaders of the protected groups, for targets that count what stays.
    """

    def __init__(
        self,
        trainer: Trainer,
        forget_pass: ForgetPass,
        reader: Reader,
        target: Target | float,
        protected: Sequence[Any] = (),
    ) -> None:
        self._trainer, self._forget_pass, self._reader = trainer, forget_pass, reader
        self._target, self._protected = target, protected

    def judge(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """What runs a batch for its level: the module's own step, unless levels are of what is raised."""
        return step if isinstance(self._target, Target) and self._target.by_objective else unwrap_step(step)[0]

    def measure(self, level_of: Callable[..., Any], *step: Any) -> Tensor:
        """What a function of the module, of what gives mean losses, and of a retain batch returns, 0-d.

        Args:
            level_of: The function, as `Target.measure`.
            step: What runs a batch, and the arguments of the retain batch.

        Raises:
            HAMUStateError: If it is not one number.
        """
        level = self._measure(level_of, *step)
        if level.numel() != 1:
            raise HAMUStateError(f"Expected {self._target} to be one number, but got {level}.")
        return self._agree(level.reshape(()))

    def measure_pair(self, level_of: Callable[..., Any], *step: Any) -> tuple[Tensor, Tensor]:
        """The same of two numbers, `[2]`."""
        first, second = self._agree(self._measure(level_of, *step))
        return first, second

    def _measure(self, level_of: Callable[..., Any], step: Callable[..., Any], *args: Any) -> Tensor:
        def read(module: Any, mean_loss: Callable[[Iterable[Any]], Tensor], batch: Any) -> Any:
            def mean(data: Any) -> Tensor:
                return mean_loss(data if isinstance(data, MeasuringLoader | Excerpt) else self._reader.open(data))

            return level_of(module, mean, batch)

        judged = self.judge(step)
        try:
            return self._forget_pass.measure(read, judged, *args)
        except Exception as error:
            if judged is step or isinstance(error, HAMUError):
                raise
            raise HAMUStateError(
                "Expected the module's own loss of the data of a target, by which it is judged whatever is raised, but "
                f"`training_step` raised {type(error).__name__}: {error}. ByObjective(target) judges by the objective."
            ) from error

    def _agree(self, level: Tensor) -> Tensor:
        """Processes may have summed in different orders; they have to decide alike."""
        strategy = self._trainer.strategy
        agreed: Tensor = strategy.reduce(
            level.to(strategy.root_device, widest_float(strategy.root_device)), reduce_op="mean"
        )
        return agreed

    def mean_loss(self, batches: Iterable[Any], *step: Any) -> Tensor:
        """The mean loss over batches, 0-d: as any target is measured, so that both are in one unit."""
        return self.measure(lambda module, mean_loss, batch: mean_loss(batches), *step)

    def measure_target(self, forget: Any, *step: Any) -> tuple[Tensor, Any]:
        """The level of the target, 0-d, and the loader of held-out data that it has found for itself; None for none.

        Args:
            forget: The loader of what is to be forgotten.
            step: What runs a batch, and the arguments of the retain batch.
        """
        if not isinstance(self._target, AnswerTarget):
            assert isinstance(self._target, Target)
            return self.measure(self._target.measure, *step), None
        around = Surroundings(self._trainer, self._reader, forget, self._protected, self.measure, step)
        end = self._target.prepare(around)
        return end, around.held_out

    def find_not_finite(self, level: Tensor, what: str, data: Any, step: tuple[Any, ...], *, is_first: bool) -> str:
        """Which samples of some data have no finite loss, in words; empty where that is not known.

        Args:
            level: Their level, which is not finite.
            what: What it is called.
            data: The data.
            step: What runs a batch, and the arguments of the retain batch.
            is_first: Whether no step was taken yet.

        Raises:
            HAMUStateError: If no step was taken yet.
        """
        found = find_not_finite(self._forget_pass, self._reader.find(data), (self.judge(step[0]), *step[1:]))
        if is_first:
            raise HAMUStateError(
                f"Expected {what} to be a finite number before the first step, but got {level}{found}."
            )
        return found
