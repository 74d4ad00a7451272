"""The forget pass: one forward and backward pass on a forget batch that leaves nothing behind but its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from hamu_lightning.callbacks import _compat, _compat_loaders
from hamu_lightning.callbacks.passes._batches import comparing, count_samples
from hamu_lightning.callbacks.passes._batchnorm import explaining_single_samples
from hamu_lightning.callbacks.passes._guard import ModuleGuard
from hamu_lightning.callbacks.passes._isolated_pass import IsolatedPass, detached_loss
from hamu_lightning.callbacks.passes._loaders import copied
from hamu_lightning.callbacks.passes._metrics import StreamMetrics
from hamu_lightning.callbacks.passes._objective import in_mode_of, is_wrapped
from hamu_lightning.callbacks.passes._streams import EMPTY_STREAM, EmptyStreamError, ForgetStream
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.gramian import widest_float
from hamu_lightning.optim import HAMUOptimizer, unscale_unseen_
from hamu_lightning.randomness import RandomStream, capture_random, restore_random

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class NoLossError(HAMUStateError):
    """`training_step` gave no loss for a full pass over the forget loader."""


@dataclass(frozen=True)
class Recording:
    """A batch as it was before a pass, with the random numbers of the pass, and the loss that came out."""

    batch: Any
    random: tuple[Any, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    share: Tensor | None
    loss: Tensor


class ForgetPass(IsolatedPass):
    """Runs forget batches through the module, isolated from everything that the retain stream owns.

    Args:
        trainer: The trainer, in a fit.
        optimizer: Where the gradient goes.
        random: The random stream of the pass.
        slot: The context in which the gradient is accumulated.
        guard: Keeps the module as it was; several passes may share one.

    Attributes:
        stream: Where batches come from; None if each training batch brings its own.
        records: Called with each batch and its loss, where somebody wants to run it again.
        sees_levels: Whether each batch is run a second time, in evaluation mode and without a trace, for its `level`.
        level_of: Gives what runs a batch for its level: another step where something else than the loss is raised.
        level: The loss of the last batch, in evaluation mode where `sees_levels`; weighted as the loss is.
        logged: What the module logged in the last pass: by name the value or a metric, and the arguments of `log`.
    """

    def __init__(
        self,
        trainer: Trainer,
        optimizer: HAMUOptimizer,
        random: RandomStream,
        slot: Callable[[], AbstractContextManager[None]],
        guard: ModuleGuard,
    ) -> None:
        super().__init__(trainer, optimizer, random, guard)
        self._slot = slot
        self.stream: ForgetStream | None = None
        self.records: Callable[[Recording], None] | None = None
        self.logged: dict[str, tuple[Tensor | Metric, dict[str, Any]]] = {}
        self._metrics = StreamMetrics()
        self._group = _compat_loaders.data_parallel_group(trainer)
        self._has_samples, self._is_compared = True, False
        self._logged_in: Any = None
        self.sees_levels = False
        self.level_of: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda step: step
        self.level: Tensor | None = None

    def run(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any = None) -> Tensor:
        """Run one forget batch through `step`, the strategy's `training_step`, and accumulate its gradient.

        Args:
            step: Called like for the retain batch, with the forget batch in its place.
            args: The arguments of the retain batch.
            kwargs: Likewise.
            batch: The forget batch, already transferred, where the training loader brought it.

        Returns:
            The loss of the batch, detached, 0-d; with several processes weighted by this one's share of the samples.

        Raises:
            NoLossError: If the module returns None for a whole pass.
            HAMUStateError: If the loss has no graph.
        """
        for _ in range(self._patience(batch)):
            loss = self._run_once(step, args, kwargs, batch)
            if loss is not None:
                return loss
        raise NoLossError(
            "Expected `training_step` to return a loss for forget batches, but it returned None for a full pass. "
            "HAMU needs the gradient of the forget loss; check what the module skips."
        )

    def fetch(self) -> Any:
        """Return the next batch of the stream, transferred."""
        self._random.draw += 1
        with self._isolated(None):
            return self._next_batch(None)

    def unscale(self) -> None:
        """Divide the gradient by the loss scale, where there is one, unseen by the scaler."""
        scaler = _compat.grad_scaler(self._trainer)
        if scaler is not None:
            with self._slot():
                unscale_unseen_(scaler, [p for group in self._optimizer.param_groups for p in group["params"]])

    def clip(self) -> None:
        """Clip the forget gradient as the trainer and the module clip the retain gradient, on its own."""
        trainer, module = self._trainer, self._trainer.lightning_module
        with self._isolated(None), self._slot(), _compat.hook_name(module, "configure_gradient_clipping"):
            module.configure_gradient_clipping(
                trainer.optimizers[0],
                gradient_clip_val=trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            )

    def _patience(self, batch: Any) -> int:
        if batch is not None or self.stream is None or self._group is not None:
            return 1  # with several processes a pass is a joint one: it cannot be repeated on one of them
        return self.stream.length or 100

    def _run_once(
        self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any
    ) -> Tensor | None:
        self._random.draw += 1
        explaining: AbstractContextManager[None] = nullcontext()
        with self._isolated(batch, self._logged_in), self._mode_of(step):
            if batch is None:
                batch = self._next_batch(args[0])
                self._results.batch = batch
                explaining = self._compare(batch, args[0], step)
                samples = math.nan if self.stream is None else self.stream.samples
            else:
                samples = count_samples(batch)
            share = self._share(samples)
            kept = None if self.records is None else (copied(batch), capture_random(self.generators))
            level_step = self.level_of(step) if self.sees_levels else step
            # The loss is the level where nothing is in training mode anyway.
            is_training = any(part.training for part in self._trainer.lightning_module.modules())
            differs = level_step is not step or (self.sees_levels and is_training)
            again = copied(batch) if differs else None
            with explaining, explaining_single_samples(), self._metrics.noting(self._trainer.lightning_module):
                output = step(batch, *args[1:], **kwargs)
            loss = _compat.split_step_output(output)
            if loss is None:
                return None
            self._gave_loss = args[1:]
            self.logged, self._logged_in = self._read_logged(), self._results
            check_loss(loss)
            loss = _weigh(loss, share)
            self._backward(loss, self._slot)
            value = loss.detach().float().mean().clone()
            if self.records is not None and kept is not None:
                self.records(Recording(*kept, args[1:], kwargs, share, value))
        self.level = value
        if again is not None:
            seen = self.measuring(lambda: detached_loss(level_step(again, *args[1:], **kwargs)), args[0])
            self.level = value if seen is None else _weigh(seen, share)
        return value

    def _read_logged(self) -> dict[str, tuple[Tensor | Metric, dict[str, Any]]]:
        """What the module logged; of a process without samples only the metrics, which all processes gather jointly."""
        logged = _compat.read_results(self._results, partial(self._metrics.twin, is_sample=self._has_samples))
        return {name: it for name, it in logged.items() if self._has_samples or isinstance(it[0], Metric)}

    @property
    def generators(self) -> list[torch.Generator]:
        """The module's own random generators: a batch that is run again has to see the same numbers."""
        values = (value for m in self._trainer.lightning_module.modules() for value in vars(m).values())
        return [value for value in values if isinstance(value, torch.Generator)]

    def replay(self, step: Callable[..., Any], recording: Recording) -> Tensor:
        """Run a batch again at the present weights, without a trace; return its loss."""
        batch = copied(recording.batch)
        with self._isolated(batch), self._mode_of(step), self._as_in_training():
            restore_random(recording.random, self.generators)
            loss = detached_loss(step(batch, *recording.args, **recording.kwargs))
        if loss is None:
            return torch.full_like(recording.loss, torch.nan)
        return _weigh(loss, recording.share)

    def repeat(self, step: Callable[..., Any], recording: Recording) -> None:
        """Run a batch again with its backward pass, at the same weights; the gradient adds up in `.grad`."""
        batch = copied(recording.batch)
        with self._isolated(batch), self._mode_of(step):
            restore_random(recording.random, self.generators)
            loss = _compat.split_step_output(step(batch, *recording.args, **recording.kwargs))
            assert loss is not None  # it was one before
            self._backward(_weigh(loss, recording.share), nullcontext)

    def _mode_of(self, step: Callable[..., Any]) -> AbstractContextManager[None]:
        return in_mode_of(step) if self.evaluates else nullcontext()

    def _next_batch(self, retain: Any) -> Any:
        """The next forget batch. A process without one takes part with a copy of the retain batch that counts for 0."""
        assert self.stream is not None
        self._has_samples = True
        try:
            batch = next(self.stream)
        except EmptyStreamError:
            if self._group is None:
                raise
            self._has_samples = False
            return copied(retain)
        return _compat.transfer_batch(self._trainer, batch)

    def _compare(self, batch: Any, retain: Any, step: Callable[..., Any]) -> AbstractContextManager[None]:
        """Compare the first batch with one of the training loader; those for an objective may be of another kind."""
        is_due = not self._is_compared and self._has_samples and retain is not None and not is_wrapped(step)
        self._is_compared = True
        return comparing(batch, retain) if is_due else nullcontext()

    def _share(self, samples: float) -> Tensor | None:
        """What to multiply the mean loss of this process by, so that the mean over processes is that over samples.

        None with one process. Where batch sizes cannot be told, all processes that have samples count the same.
        """
        if self._group is None:
            return None
        has = float(self._has_samples)
        samples = samples if self._has_samples else 0.0
        device = self._trainer.strategy.root_device
        own = torch.tensor((samples, has), dtype=widest_float(device), device=device)
        total = own.clone()
        torch.distributed.all_reduce(total, group=self._group)
        if not has and total[1] == 0:  # read on the host, but only by a process without samples
            raise EmptyStreamError(EMPTY_STREAM)
        by_samples, by_process = own / total * torch.distributed.get_world_size(self._group)
        return torch.where(by_samples.isfinite(), by_samples, by_process)

    def _backward(self, loss: Tensor, slot: Callable[[], AbstractContextManager[None]]) -> None:
        trainer = self._trainer
        with slot(), _compat.hook_name(trainer.lightning_module, "backward"):
            # Lightning divides the loss of each micro-batch by the full window; so do we.
            trainer.strategy.backward(loss / trainer.accumulate_grad_batches, trainer.optimizers[0])


def _weigh(loss: Tensor, share: Tensor | None) -> Tensor:
    """The loss times the share of the samples that this process has; None for all."""
    return loss if share is None else loss * share.to(loss.dtype)


def check_loss(loss: object) -> None:
    """Raise unless the loss can be differentiated."""
    if not isinstance(loss, Tensor):
        raise HAMUStateError(f"Expected `training_step` to return a loss tensor, but got {type(loss).__name__}.")
    if not loss.requires_grad:
        raise HAMUStateError(
            "Expected the forget loss to depend on the weights, but it has no graph. "
            "Return the loss from `training_step` without detach() and outside torch.no_grad()."
        )
