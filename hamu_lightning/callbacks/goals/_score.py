"""One number for how good the weights are, for `ModelCheckpoint`."""

from __future__ import annotations

import math

from hamu_lightning.callbacks.goals._conditions import RetainAbove, StopCondition
from hamu_lightning.callbacks.goals._signals import Signals
from hamu_lightning.callbacks.goals._targets import REACHED


def compute_score(
    signals: Signals, conditions: tuple[StopCondition, ...], target: float | None, level: float | None = None
) -> float:
    """How good the weights before a step are, for `ModelCheckpoint(monitor="hamu/score", mode="max")`.

    - Above the ceiling of the retain loss: less than 0, by how much.
    - Short of the target (or without one): the more forgotten, the nearer to 1.
    - At the target: more than 1, the more the smaller the retain loss.

    The losses are those of the batches; with a target the forget loss is the level that is followed, in evaluation
    mode, where it is given.
    """
    excess = max((signals.retain_loss - c.loss for c in conditions if isinstance(c, RetainAbove)), default=-math.inf)
    if excess > 0:
        return -excess
    forget = max(signals.forget_loss if level is None else level, 0.0)
    if target is not None and forget >= REACHED * target:
        return 1 + 1 / (1 + max(signals.retain_loss, 0.0))
    return forget / (forget + 1) if target is None else forget / target
