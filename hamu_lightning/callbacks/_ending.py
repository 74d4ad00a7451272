"""Who ended a fit: looked up at its end, where unlearning itself did not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hamu_lightning.callbacks import _compat
from hamu_lightning.wording import count

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def describe_ending(trainer: Trainer) -> str:
    """What ended the fit that has not ended by itself, in a sentence; empty where nobody but unlearning did.

    An exception or a signal has no end of training: `on_exception` names it.
    """
    step, limit = trainer.global_step, _find_limit(trainer)
    if limit:
        return f"{limit} ended the fit."
    if not trainer.should_stop:
        return ""
    total = _compat.count_steps(trainer)
    after = f"after {step} of {total:.0f} steps" if step < total < float("inf") else f"after {count(step, 'step')}"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        names = {base.__name__ for base in type(callback).__mro__}
        if "EarlyStopping" in names and _has_stopped(callback):
            return (
                f"{type(callback).__name__} ({callback.monitor}) ended the fit {after}; a validation set that holds "
                "what is forgotten will do that."
            )
        if "Timer" in names and _is_over(callback):
            return f"{type(callback).__name__} (max_time) ended the fit {after}."
    return f"Another callback, or the module, ended the fit {after}: it set `trainer.should_stop`."


def _find_limit(trainer: Trainer) -> str:
    """The limit of the Trainer that the fit has come to, as it is set; empty where it has come to none."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"max_steps={trainer.max_steps}"
    epochs = trainer.max_epochs
    if epochs not in (None, -1) and _compat.count_epochs(trainer) >= epochs:
        return f"max_epochs={epochs}"
    return ""


def _has_stopped(callback: Any) -> bool:
    # In the first epoch `stopped_epoch` stays 0.
    return bool(callback.stopped_epoch) or getattr(callback, "stopping_reason_message", None) is not None


def _is_over(timer: Any) -> bool:
    left = timer.time_remaining()
    return left is not None and left <= 0
