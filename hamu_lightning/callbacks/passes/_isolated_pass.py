"""Batches through the module without a trace: what is put back, and losses that are only measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks.passes._batches import counted
from hamu_lightning.callbacks.passes._guard import ModuleGuard
from hamu_lightning.callbacks.passes._loaders import copied
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.objectives import evaluating
from hamu_lightning.optim import HAMUOptimizer, hidden_gradients
from hamu_lightning.randomness import RandomStream

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# Passes count their draws from 1. All measurements see the numbers of one draw: augmentation is the same in them.
_MEASURING = 0


class IsolatedPass:
    """Isolates passes from everything that the retain stream owns, and measures losses.

    Args:
        trainer: The trainer, in a fit.
        optimizer: Whose weights are trained.
        random: The random stream of the pass.
        guard: Keeps the module as it was; several passes may share one.

    Attributes:
        not_finite: The numbers of the batches whose loss was not finite in the last measurement.
        batch_losses: The losses of its batches, and what each counts for; None before.
        evaluates: Whether losses are measured in evaluation mode: not where the module's step does not run so.
    """

    def __init__(self, trainer: Trainer, optimizer: HAMUOptimizer, random: RandomStream, guard: ModuleGuard) -> None:
        self._trainer, self._optimizer, self._random, self._guard = trainer, optimizer, random, guard
        self.not_finite: list[int] = []
        self.batch_losses: tuple[Tensor, Tensor] | None = None
        self.evaluates = True
        self._free: tuple[Any, list[nn.Parameter]] | None = None
        # The arguments beside the batch when there last was a loss: some modules give none at some numbers of batches.
        self._gave_loss: tuple[Any, ...] | None = None

    def measure(
        self, level: Callable[..., Any], step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Measure a level at the present weights, in evaluation mode and without a trace.

        For the loss on other data: `measure(lambda module, mean_loss, batch: mean_loss(data), ...)`.

        Args:
            level: Called with the module, a function that gives its mean loss on the batches of a loader, and a retain
                batch; see `Target.measure`.
            step: Runs a batch: the strategy's `training_step` or an objective.
            args: The arguments of the retain batch.
            kwargs: Likewise.

        Raises:
            HAMUStateError: If there is no loss to measure.
        """

        def mean_loss(loader: Iterable[Any]) -> Tensor:
            sized = self._sized_losses(loader, step, args, kwargs)
            if sized:
                self._gave_loss = args[1:]
            elif self._gave_loss is not None:
                sized = self._sized_losses(loader, step, (None, *self._gave_loss), kwargs)
            if not sized:
                raise HAMUStateError("Expected a loss on the held-out data of the target, but it has no batch.")
            losses, sizes = torch.stack([loss for loss, _ in sized]), [size for _, size in sized]
            # Where one of them is not known, all count the same.
            weights = torch.tensor(sizes if all(map(math.isfinite, sizes)) else [1.0] * len(sizes)).to(losses)
            self.not_finite = (~losses.isfinite()).nonzero().flatten().tolist()
            self.batch_losses = losses, weights
            return losses @ weights / weights.sum()

        def measure() -> Tensor:
            return torch.as_tensor(level(self._trainer.lightning_module, mean_loss, copied(args[0]))).detach()

        measured: Tensor = self.measuring(measure, args[0])
        return measured

    def measuring(self, measure: Callable[[], Any], batch: Any) -> Any:
        """Call a function that runs batches, with the module in evaluation mode, and leave no trace.

        All submodules are in evaluation mode, by their flags alone. A module whose step does not run so (some give no
        loss then) is measured in the mode that it trains in, with a warning. Every process takes all of its data: with
        shares of unequal length the forward passes could not be joint ones.

        Args:
            measure: Returns what was measured.
            batch: A retain batch.
        """
        if not self.evaluates:
            return self._measure_in_own_mode(measure, batch)
        try:
            with evaluating(self._trainer.lightning_module):
                return self._measure_in_own_mode(measure, batch)
        except Exception as error:
            with suppress(Exception):
                measured = self._measure_in_own_mode(measure, batch)
                self.evaluates = False
                rank_zero_warn(
                    f"Levels are measured in the mode that the module trains in: in evaluation mode its step raised "
                    f"{type(error).__name__}. Dropout and BatchNorm are in the numbers; let `training_step` return its "
                    "loss in evaluation mode too."
                )
                return measured
            raise

    def _measure_in_own_mode(self, measure: Callable[[], Any], batch: Any) -> Any:
        draw, self._random.draw = self._random.draw, _MEASURING
        try:
            with self._isolated(batch), self._as_in_training():
                return measure()
        finally:
            self._random.draw = draw

    def see(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The loss of a batch that is there already, in evaluation mode, 0-d; none where the module gives none."""
        loss = self.measuring(lambda: detached_loss(step(copied(args[0]), *args[1:], **kwargs)), args[0])
        return [] if loss is None else [loss]

    def losses(
        self, loader: Iterable[Any], step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[Tensor | None, float]]:
        """For each batch its loss and the number of its samples; to be called inside of `measuring`."""
        for batch, size in counted(loader):
            self._results.batch = batch = _compat.transfer_batch(self._trainer, copied(batch))
            yield detached_loss(step(batch, *args[1:], **kwargs)), size

    def _sized_losses(self, *step: Any) -> list[tuple[Tensor, float]]:
        return [(loss, size) for loss, size in self.losses(*step) if loss is not None]

    def _isolated(self, batch: Any, earlier: Any = None) -> ExitStack:
        """Everything that the pass must not touch, put back at the end; `earlier`: what an earlier pass logged in."""
        stack = ExitStack()
        stack.enter_context(self._random.active())
        stack.enter_context(self._guard.guarding())
        stack.enter_context(hidden_gradients(self._find_free()))
        stack.enter_context(_compat.without_callbacks(self._trainer))
        stack.enter_context(_compat.silent_loggers(self._trainer))
        stack.enter_context(_compat.buffers_due(self._trainer))
        self._results = stack.enter_context(_compat.throwaway_results(self._trainer, batch, earlier))
        return stack

    def _find_free(self) -> list[nn.Parameter]:
        """The parameters that the optimizer does not have; looked for again where the guard had to."""
        groups = self._optimizer.param_groups
        known = self._guard.walks, [len(group["params"]) for group in groups]
        if self._free is None or self._free[0] != known:
            owned = {id(p) for group in groups for p in group["params"]}
            self._free = known, [p for p in self._trainer.lightning_module.parameters() if id(p) not in owned]
        return self._free[1]

    @contextmanager
    def _as_in_training(self) -> Iterator[None]:
        """With gradients, which a module may take inside of its step; those that it leaves in `.grad` are dropped.

        No backward pass follows: processes are not told to wait for one.
        """
        module = self._trainer.lightning_module
        owned = {p for group in self._optimizer.param_groups for p in group["params"]}
        with (
            hidden_gradients({*module.parameters(), *owned}),
            _compat.without_sync(self._trainer),
            _compat.hook_name(module, "training_step"),
            torch.enable_grad(),
        ):
            yield


def detached_loss(output: Any) -> Tensor | None:
    """The loss of a step's output as a 0-d tensor without a graph; None where there is none."""
    loss = _compat.split_step_output(output)
    return loss.detach().float().mean().clone() if isinstance(loss, Tensor) else None
