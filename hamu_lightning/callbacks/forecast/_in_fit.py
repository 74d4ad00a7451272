"""The preflight in a fit, through the trainer's strategy, precision, transfer and clipping."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hamu_lightning.callbacks import _compat, _compat_loaders
from hamu_lightning.callbacks._refusal import HAMUMisconfigurationError
from hamu_lightning.callbacks.forecast._probe import Probe, check_two_groups
from hamu_lightning.callbacks.forecast._report import PreflightReport
from hamu_lightning.callbacks.passes import ForgetPass, ForgetStream, ModuleGuard, split_batch, twin_loader
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.randomness import RandomStream

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

BATCHES = 16


class FitPreflight:
    """The same in a fit, through the trainer's strategy, precision, transfer and clipping.

    Args:
        trainer: The trainer, with its loaders set up.
        optimizer: The optimizer of the fit; it is only asked for its rule, its mask and its learning rates.
        forget_loader: The loader of forget batches; None where the training loader brings them.
        seed: Of the random numbers.
        raised: What is raised on the forget data, in words.

    Raises:
        HAMUMisconfigurationError: With several processes, or where a loader can be iterated only once.
    """

    def __init__(self, trainer: Trainer, optimizer: HAMUOptimizer, forget_loader: Any, seed: int, raised: str) -> None:
        if trainer.world_size > 1:
            raise HAMUMisconfigurationError(
                f"Expected one process with `preflight=True`, but the Trainer has {trainer.world_size}: the batches of "
                "one are not those of all. Call `hamu_lightning.preflight(module, retain_loader, forget_loader, rule)` "
                "in one process before the fit, with the joint batch size."
            )
        check_two_groups(optimizer.rule)
        self._trainer, self._aim, self._raised = trainer, optimizer.aim, raised
        randoms = RandomStream(seed), RandomStream(seed, rank=1)
        try:
            divisor, module = trainer.accumulate_grad_batches, trainer.lightning_module
            self._probe = Probe(module, optimizer.param_groups, optimizer.rule, divisor, optimizer.mask)
            streams = [twin_loader(loader) for loader in (forget_loader, _compat_loaders.train_batches(trainer))]
        except HAMUValueError as error:
            raise HAMUMisconfigurationError(str(error)) from error
        self._forget, self._retain = (
            ForgetPass(trainer, self._probe.optimizer, random, slot, ModuleGuard(trainer.lightning_module))
            for random, slot in zip(randoms, (self._probe.forget, self._probe.retain), strict=True)
        )
        if forget_loader is not None:
            self._forget.stream = ForgetStream(streams[0], randoms[0])
        self._retain.stream = ForgetStream(streams[1], randoms[1])
        self._batch: Any = None
        self._index = -1

    def run(self, forget_step: Callable[..., Any], retain_step: Callable[..., Any]) -> PreflightReport:
        """Measure, before the first forget pass: all hooks that prepare the module have run, BatchNorm is frozen.

        Args:
            forget_step: Runs a forget batch: the strategy's `training_step`, or an objective.
            retain_step: Runs a retain batch, likewise.
        """
        pairs = int(min(BATCHES, self._trainer.num_training_batches))
        self._probe.take_aim(self._aim)
        return self._probe.measure(
            partial(self._run_forget, forget_step), partial(self._run_retain, retain_step), pairs, raised=self._raised
        )

    def _run_forget(self, step: Callable[..., Any]) -> Tensor:
        self._index += 1
        forget = None
        if self._forget.stream is None:
            self._batch, forget = split_batch(self._retain.fetch(), self._probe.optimizer.rule.groups)
        return self._run(step, self._forget, forget)

    def _run_retain(self, step: Callable[..., Any]) -> Tensor:
        return self._run(step, self._retain, self._batch)

    def _run(self, step: Callable[..., Any], one: ForgetPass, batch: Any) -> Tensor:
        arguments = _compat.step_arguments(self._trainer.lightning_module, batch, self._index)
        loss = one.run(step, arguments, {}, batch)
        one.unscale()
        if _compat.clips_gradients(self._trainer):
            one.clip()
        return loss
