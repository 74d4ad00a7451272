"""What the retain data may lose: the promise that holds for the set, not only for the batch of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hamu_lightning.checks import check_count, check_flag, check_number, check_type, store
from hamu_lightning.wording import count


@dataclass(frozen=True)
class Reading:
    """What was measured on an excerpt, in evaluation mode.

    Attributes:
        loss: Mean over its samples.
        accuracy: Share of its labels that are predicted, in [0, 1]; NaN where predictions cannot be read.
        samples: How many samples it has; NaN where that cannot be told.
    """

    loss: float
    accuracy: float = math.nan
    samples: float = math.nan

    def describe_way(self, now: Reading) -> str:
        """The way from here to another reading, in words."""
        accuracy = f", accuracy {100 * self.accuracy:.1f} % -> {100 * now.accuracy:.1f} %"
        samples = "" if math.isnan(self.samples) else f" ({count(round(self.samples), 'sample')})"
        return f"loss {self.loss:.4g} -> {now.loss:.4g}{'' if math.isnan(self.accuracy) else accuracy}{samples}"


@dataclass(frozen=True)
class RetainGuard:
    """Holds the retain loss and accuracy of the *set*: what steps promise holds for their own batches.

    A fixed excerpt of the retain data, drawn at random, is measured in evaluation mode at the start, every so many
    combined steps, before a target counts as reached, and at the end. With `L_0`, `A_0` at the start it is within
    bounds as long as

        L <= max(factor L_0, L_0 + rise)   and   A >= A_0 - a - 2 sqrt(a / n),   a = accuracy

    the second where labels and predictions can be read (`objectives.ModuleOutputs`); its last term is what a fall by
    `a` may look like on n samples (two standard errors of a number whose mean is `a n`). Where it has left them, the
    weights and the optimizer's state go back to the last reading within bounds, and the way goes on with a trust region
    `shrink` times as large; after `max_returns` returns the fit stops there. So a fit that is guarded ends within
    bounds, as far as the excerpt can tell. How the bounds were chosen is in docs/targets.md.

    Measuring leaves no trace. It costs two forward passes over the excerpt (loss, predictions) every so many steps,
    and one copy of the weights and the optimizer's state. The retain loader must be one that can be read beside a pass
    under way; else there is no guard, and a message says so.

    Args:
        accuracy: By how much the accuracy may fall, a share in [0, 1]; with its last term one point is 1.6 points on
            1,024 samples.
        factor: By what factor the loss may rise, at least 1.
        rise: How far it may rise in any case, in the unit of the loss: from near 0 a factor means nothing.
        samples: How many samples of the retain data are measured, at most.
        every: Every how many combined steps.
        shrink: Factor of the trust region after a return, in (0, 1).
        max_returns: After how many returns the fit stops.
        holdout: Whether the loss on the held-out data of the target, where it has some, is held in the same way.

    Raises:
        HAMUValueError: If an argument is out of its range.

    Example:
        >>> guard = RetainGuard()
        >>> guard.explain("retain", Reading(0.1, 0.96, 1024), Reading(0.12, 0.945, 1024))
        >>> guard.explain("retain", Reading(0.1, 0.96, 1024), Reading(0.12, 0.94, 1024))
        'the retain accuracy fell from 96.0 % to 94.0 % (allowed: 94.4 %)'
        >>> guard.explain("retain", Reading(0.1), Reading(0.25))
        'the retain loss rose from 0.1 to 0.25 (allowed: 0.15)'
    """

    accuracy: float = 0.01
    factor: float = 1.5
    rise: float = 0.05
    samples: int = 1024
    every: int = 10
    shrink: float = 0.5
    max_returns: int = 4
    holdout: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        store(
            self,
            accuracy=check_number("accuracy", self.accuracy, least=0, most=1),
            factor=check_number("factor", self.factor, least=1),
            rise=check_number("rise", self.rise, least=0),
            samples=check_count("samples", self.samples),
            every=check_count("every", self.every),
            shrink=check_number("shrink", self.shrink, above=0, below=1),
            max_returns=check_count("max_returns", self.max_returns),
            holdout=check_flag("holdout", self.holdout),
        )

    def explain(self, what: str, start: Reading, now: Reading) -> str | None:
        """Tell how a reading is out of bounds, with numbers; None where it is within them.

        Args:
            what: What was measured, in a word.
            start: The reading at the start.
            now: The present one.
        """
        allowed = max(self.factor * start.loss, start.loss + self.rise)
        if not now.loss <= allowed:  # NaN too
            return f"the {what} loss rose from {start.loss:.4g} to {now.loss:.4g} (allowed: {allowed:.4g})"
        noise = 2 * math.sqrt(self.accuracy / start.samples) if start.samples > 0 else 0.0
        least = start.accuracy - self.accuracy - noise
        if now.accuracy < least - _ROUNDING:
            return (
                f"the {what} accuracy fell from {100 * start.accuracy:.1f} % to {100 * now.accuracy:.1f} % "
                f"(allowed: {100 * least:.1f} %)"
            )
        return None


# Accuracies are quotients of whole numbers.
_ROUNDING = 1e-9


def choose_guard(guard: Any, *, has_target: bool) -> RetainGuard | None:
    """Return what is guarded: as the user says, and by default where there is a target."""
    if guard is None:
        guard = has_target
    if isinstance(guard, RetainGuard):
        return guard
    check_type("guard", guard, bool, "RetainGuard(...), True or False")
    return RetainGuard() if guard else None
