"""With `_compat_loaders` and `_compat_bar` the only place that touches what Lightning (2.6) keeps private.

Nothing is imported from Lightning here except types: `lightning.pytorch` and `pytorch_lightning` are disjoint class
trees, and all objects are reached from the trainer at hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torchmetrics import Metric


class StepPatch:
    """Puts a function around the strategy's `training_step`, after all start hooks and inside its `no_sync` context.

    lightning/pytorch/trainer/call.py `_call_strategy_hook` looks `training_step` up on the strategy at each batch, so
    an attribute of the instance comes before the method of the class.
    """

    def __init__(
        self, strategy: Any, around: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
    ) -> None:
        self._strategy = strategy
        self._before = strategy.__dict__.get("training_step")
        original = strategy.training_step
        strategy.training_step = lambda *args, **kwargs: around(original, args, kwargs)

    def remove(self) -> None:
        """Take the function away again."""
        if self._before is not None:
            self._strategy.training_step = self._before
        else:
            self._strategy.__dict__.pop("training_step", None)


@contextmanager
def throwaway_results(trainer: Trainer, batch: Any, earlier: Any = None) -> Iterator[Any]:
    """Collect what the module logs in a collection of its own, so that the trainer's keeps the retain stream alone.

    Yields the collection, of the trainer's own class (lightning/pytorch/trainer/connectors/logger_connector/result.py);
    `earlier`, that of an earlier pass, where it can be used again: making one takes longer than a small step.
    """
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    kept, kept_fx = loop._results, connector._current_fx
    loop._results = results = earlier if _is_emptied(earlier, kept) else type(kept)(training=True)
    results.batch, results.batch_size = batch, None
    try:
        yield results
    finally:
        loop._results, connector._current_fx = kept, kept_fx
        results.batch = None  # it may be used again, and should hold no data until then


def _is_emptied(results: Any, like: Any) -> bool:
    """Whether nothing of an earlier pass is left in a collection. Means over steps, and metrics, are made anew."""
    if type(results) is not type(like) or any(not it.is_tensor or it.meta.on_epoch for it in results.values()):
        return False
    for item in results.values():
        item._forward_cache, item.has_reset = None, True
        item.to = _stay  # nothing is added up here that would have to be on a device
    return True


def _stay(*_: Any) -> None:
    """In the place of a walk over all attributes, which Lightning takes at each call of `log`."""


def read_results(results: Any, twin: Callable[[Metric], Metric | None]) -> dict[str, tuple[Tensor | Metric, Any]]:
    """Read what was logged: for each name the value, and the arguments to log it again with.

    `twin` gives the metric to log in the place of one of the module's. Of one that has none, the mean of the values of
    the batches is logged.
    """
    logged: dict[str, tuple[Tensor | Metric, Any]] = {}
    for item in results.values():
        if item.has_reset:
            continue  # of an earlier pass
        value = item._forward_cache if item.meta.on_step or not item.is_tensor else item.compute()
        metric = None if item.is_tensor else twin(item.value)
        if metric is not None or (isinstance(value, Tensor) and value.numel() == 1):
            # An explicit `logger=True` would warn where there is no logger.
            logger = None if item.meta.logger else False
            levels = {"on_step": item.meta.on_step, "on_epoch": item.meta.on_epoch, "logger": logger}
            if item.is_tensor:
                levels["reduce_fx"] = item.meta.reduce_fx
            elif metric is not None:
                levels["metric_attribute"] = item.meta.name  # else the module is searched for it
            found = value.detach().clone() if metric is None else metric
            logged[item.meta.name] = (found, {**levels, "batch_size": results.batch_size or 1})
    return logged


# Where unlearning's own numbers are logged.
_OWN_HOOK = "on_train_batch_end"


def withdraw_logged(trainer: Trainer, prefix: str) -> None:
    """Let our names that begin so be absent from the loggers until they are logged again."""
    for item in trainer.fit_loop.epoch_loop._results.values():
        if item.meta.fx == _OWN_HOOK and item.meta.name.startswith(prefix):
            if item.meta.on_epoch:
                item._forward_cache = None  # the mean over the epoch goes on
            else:
                item.reset()


def names_of_others(trainer: Trainer) -> set[str]:
    """What the module logs, in training and in validation."""
    loop = trainer.fit_loop.epoch_loop
    items = [item for results in (loop._results, loop.val_loop._results) for item in results.values()]
    return {item.meta.name for item in items if item.meta.fx != _OWN_HOOK}


@contextmanager
def without_callbacks(trainer: Trainer) -> Iterator[None]:
    """Hide the callbacks: their hooks run for the retain pass only.

    The progress bar stays, since a thread of its own may ask the trainer for it at any time
    (lightning/pytorch/callbacks/progress/rich_progress.py `render`).
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [c for c in callbacks if c is trainer.progress_bar_callback]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]


class _Silent:
    """In the place of a logger, or of what it writes to: tells what the other one is, and writes nothing."""

    def __init__(self, other: Any) -> None:
        self._other = other

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._other)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._other, name)
        if name == "experiment":
            return _Silent(value)
        return (lambda *_, **__: None) if callable(value) else value


@contextmanager
def silent_loggers(trainer: Trainer) -> Iterator[None]:
    """Let loggers write nothing: a module may call them in its `training_step`."""
    loggers = trainer.loggers
    trainer.loggers = [_Silent(logger) for logger in loggers]  # type: ignore[misc]
    try:
        yield
    finally:
        trainer.loggers = loggers


@contextmanager
def validating(trainer: Any) -> Iterator[None]:
    """Let a Trainer, if there is one, be in validation: transfer hooks augment in training only."""
    if trainer is None:
        yield
        return
    stage, trainer.validating = trainer.state.stage, True
    try:
        yield
    finally:
        trainer.state.stage = stage


@contextmanager
def hook_name(module: LightningModule, name: str) -> Iterator[None]:
    """Let the module believe that it is in this hook: `self.log` asks for it."""
    before = module._current_fx_name
    module._current_fx_name = name
    try:
        yield
    finally:
        module._current_fx_name = before


def without_sync(trainer: Trainer) -> AbstractContextManager[Any]:
    """Let a forward pass be one that no backward pass follows (lightning/pytorch/strategies/parallel.py)."""
    block = getattr(trainer.strategy, "block_backward_sync", None)
    return nullcontext() if block is None else block()


@contextmanager
def buffers_due(trainer: Trainer) -> Iterator[None]:
    """Let DistributedDataParallel send the buffers of the first process round when it would have without us.

    That is due once after each synchronised backward pass, and a pass between would use it up
    (torch/nn/parallel/distributed.py `require_forward_param_sync`).
    """
    model, name = trainer.strategy.model, "require_forward_param_sync"
    before = getattr(model, name, None)
    try:
        yield
    finally:
        if isinstance(before, bool):
            setattr(model, name, before)


def transfer_batch(trainer: Trainer, batch: Any) -> Any:
    """Send a batch the way of the training loop (lightning/pytorch/loops/training_epoch_loop.py `advance`)."""
    module, strategy = trainer.lightning_module, trainer.strategy
    batch = strategy.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    with hook_name(module, "batch_to_device"):
        return strategy.batch_to_device(batch, dataloader_idx=0)


def step_arguments(module: Any, batch: Any, index: int) -> tuple[Any, ...]:
    """What `training_step` is called with: its `batch_idx` is optional (training_epoch_loop.py `_build_kwargs`)."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    return (batch, index) if takes_index else (batch,)


def split_step_output(output: Any) -> Tensor | None:
    """The loss in what `training_step` returned, in any of the forms that Lightning takes; None for no loss."""
    return output.get("loss") if isinstance(output, Mapping) else output


def set_foreground_batch(trainer: Trainer, batch: Any) -> None:
    """Let the logging of the retain pass see this batch (it takes the batch size from it)."""
    results = trainer.fit_loop.epoch_loop._results
    results.batch, results.batch_size = batch, None


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the present batch ends without an optimizer step."""
    return trainer.fit_loop._should_accumulate()


def step_in_epoch(trainer: Trainer) -> int:
    """How many accumulation windows of the epoch have ended; the trainer restores it in a resumed run."""
    return int(trainer.fit_loop.epoch_loop.batch_idx // trainer.accumulate_grad_batches)


def skips_backward(trainer: Trainer) -> bool:
    """Whether the batches are only to update BatchNorm, as in the last epoch of StochasticWeightAveraging."""
    return trainer.fit_loop._skip_backward


def is_logging_step(trainer: Trainer) -> bool:
    """Whether the loggers will be written at the end of the present batch."""
    return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)  # type: ignore[attr-defined]


def write_logged(trainer: Trainer, numbers: Mapping[str, Any], step: int | None = None) -> None:
    """Write numbers to the loggers at once; by default at the present step, as Lightning does at logging steps."""
    trainer._logger_connector.log_metrics(dict(numbers), step=step)


def is_trial(trainer: Trainer) -> bool:
    """Whether the fit only tries the code on a few batches."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def grad_scaler(trainer: Trainer) -> Any | None:
    """The loss scaler of 16-bit mixed precision, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def clips_gradients(trainer: Trainer) -> bool:
    """Whether the trainer or the module changes gradients before the step."""
    method = trainer.lightning_module.configure_gradient_clipping
    is_own = getattr(method, "__module__", "").partition(".")[0] not in ("lightning", "pytorch_lightning")
    return bool(trainer.gradient_clip_val) or is_own


def misconfiguration_exception(trainer: Trainer) -> type[Exception]:
    """The `MisconfigurationException` of the package that the trainer is from, in whose module it is imported."""
    for base in type(trainer).__mro__:
        found = getattr(sys.modules.get(base.__module__), "MisconfigurationException", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return MisconfigurationException


def count_steps_left(trainer: Trainer) -> float:
    """How many optimizer steps the fit still has; infinite where nothing says when it ends."""
    return count_steps(trainer) - trainer.global_step


def count_steps(trainer: Trainer) -> float:
    """How many optimizer steps the fit has; infinite where nothing says when it ends."""
    return float(trainer.estimated_stepping_batches)


def count_epochs(trainer: Trainer) -> int:
    """How many epochs of the fit have trained on their last batch."""
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]


def has_ended(trainer: Trainer) -> bool:
    """Whether the fit has trained on its last batch; checkpoints are saved after it as well."""
    loop, batches = trainer.fit_loop, trainer.fit_loop.epoch_loop.batch_progress
    # An error may have come in the middle of a batch.
    is_done = batches.current.processed >= batches.current.ready  # type: ignore[attr-defined]
    epochs = float("inf") if loop.max_epochs in (None, -1) else loop.max_epochs
    is_last = batches.is_last_batch and loop.epoch_progress.current.ready >= epochs
    is_last |= 0 <= loop.max_steps <= trainer.global_step or (trainer.should_stop and can_stop(trainer))
    return bool(is_done and is_last)


def can_stop(trainer: Trainer) -> bool:
    """Whether `should_stop` ends the fit now; False before `min_steps` and `min_epochs`."""
    return bool(trainer.fit_loop._can_stop_early)
