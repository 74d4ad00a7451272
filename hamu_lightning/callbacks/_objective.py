"""Objectives in the place of the module's own loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks._checks import HAMUMisconfigurationError
from hamu_lightning.callbacks._streams import copied
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives import BatchPass, ModuleLoss, Objective
from hamu_lightning.rules import Rule

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
    module = trainer.lightning_module

    def run(*args: Any, **kwargs: Any) -> Any:
        with _replaced_training_step(module, objective):
            return step(*args, **kwargs)

    return run


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


def check_objectives(objective: object, retain_objective: object) -> None:
    """Raise unless both are objectives, or None, that make sense on their streams."""
    for name, value in (("objective", objective), ("retain_objective", retain_objective)):
        if not isinstance(value, Objective | None):
            raise HAMUValueError(
                f"Expected `{name}` to be one of hamu_lightning.objectives, such as NPO(beta=0.1), but got {value!r}."
            )
    if isinstance(retain_objective, Objective) and retain_objective.is_forget_only:
        raise HAMUValueError(
            "Expected `retain_objective` to be something to lower on the retain data, but got "
            f"{type(retain_objective).__name__}, which is to be raised on the forget data. Give it to `objective`."
        )


def check_target(objective: Objective | None, rule: Rule) -> None:
    """Raise if a loss is to reach a target that the objective cannot reach."""
    if rule.target_quotas and objective is not None and not objective.is_nonnegative:
        raise HAMUMisconfigurationError(
            "Expected an objective of at least 0 with a target for the forget loss, but got "
            f"{type(objective).__name__}, which is at most 0. Use a rule with a quota, or LossCap(CrossEntropy(), ...)."
        )
