"""Objectives in the place of the module's own loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks.passes._loaders import copied
from hamu_lightning.objectives import BatchPass, ModuleLoss, Objective, evaluating

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def wrap_step(step: Callable[..., Any], objective: Objective | None, trainer: Trainer) -> Callable[..., Any]:
    """Let a call of the strategy's `training_step` return an objective instead of the module's loss.

    The objective runs where the module's `training_step` would: inside the strategy's precision context and its wrapper
    of the module, so that autocast applies and the hooks of DDP fire (lightning/pytorch/strategies/strategy.py
    `training_step` looks the method up on the module at each call).

    Args:
        step: The strategy's `training_step`.
        objective: What to return. With None or `ModuleLoss()` nothing changes: `step` itself is returned.
        trainer: The trainer.
    """
    if objective is None or isinstance(objective, ModuleLoss):
        return step
    return _ObjectiveStep(step, objective, trainer.lightning_module)


def with_objective(step: Callable[..., Any], objective: Objective) -> Callable[..., Any]:
    """The same with another objective, for a step that returns one."""
    assert isinstance(step, _ObjectiveStep)
    return replace(step, objective=objective)


def is_wrapped(step: Callable[..., Any]) -> bool:
    """Whether a step returns an objective in the place of the module's loss."""
    return isinstance(step, _ObjectiveStep)


def unwrap_step(step: Callable[..., Any]) -> tuple[Callable[..., Any], Objective | None]:
    """The strategy's `training_step` behind a step, and the objective that the step returns, if any."""
    return (step.step, step.objective) if isinstance(step, _ObjectiveStep) else (step, None)


def in_mode_of(step: Callable[..., Any]) -> AbstractContextManager[None]:
    """Evaluation mode for a step whose objective wants it, backward pass included; else the mode as it is.

    Left as they are: BatchNorm, whose mode is an option of its own; recurrent layers, whose backward pass cuDNN refuses
    in evaluation mode; and what recomputes its activations, which transformers does in training mode alone.
    """
    if isinstance(step, _ObjectiveStep) and step.objective.evaluates:
        return evaluating(step.module, but=_keeps_its_mode)
    return nullcontext()


def _keeps_its_mode(part: nn.Module) -> bool:
    return isinstance(part, _BatchNorm | nn.RNNBase) or bool(vars(part).get("gradient_checkpointing"))


@dataclass(frozen=True)
class _ObjectiveStep:
    step: Callable[..., Any]
    objective: Objective
    module: LightningModule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _replaced_training_step(self.module, self.objective):
            return self.step(*args, **kwargs)


@contextmanager
def _replaced_training_step(module: LightningModule, objective: Objective) -> Iterator[None]:
    """Put an objective in the place of the module's `training_step`, for one call of the strategy."""
    attributes, own = vars(module), module.training_step
    before = {name: value for name, value in attributes.items() if name == "training_step"}  # torch.compile's, if any

    def training_step(batch: Any, *args: Any) -> Any:
        # A copy, since modules edit their batches in place, and other terms of a sum need them.
        return objective(BatchPass(module, batch, lambda: _compat.split_step_output(own(copied(batch), *args))))

    attributes["training_step"] = training_step
    try:
        yield
    finally:
        del attributes["training_step"]
        attributes.update(before)
