"""In how many steps a target should be reached."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks._refusal import HAMUMisconfigurationError
from hamu_lightning.optim import HAMUOptimizer, StepReport
from hamu_lightning.rules import Radius, TargetQuota

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# A target is approached over this share of the steps; the rest is left to settle.
_APPROACH = 2 / 3
# A target is out of reach where the steps to it are so many times those of the fit: their number is a rough estimate.
_FAR = 3
# Nobody means to reach a target in fewer steps: such a fit is a trial.
_FEW = 20


def plan_steps(trainer: Trainer, quota: TargetQuota, taken: int, every_n_steps: int) -> int:
    """In how many combined steps the target should be reached."""
    left = _compat.count_steps_left(trainer) / every_n_steps
    if quota.steps is not None:
        if quota.steps > taken + left:
            rank_zero_warn(
                f"The target should be reached in {quota.steps} combined steps, but the fit has only "
                f"{taken + math.floor(left)}: it will end too early. Set TargetQuota(steps=...) or the Trainer's steps."
            )
        return quota.steps
    if math.isinf(left):
        raise HAMUMisconfigurationError(
            "Expected to know how many steps the fit has, to divide the way to the target among them, but the Trainer "
            "has neither `max_steps` nor `max_epochs`. Set one of them, or TargetQuota(target, steps=...)."
        )
    return math.ceil((taken + left) * _APPROACH)


def count_least(level: float, target: float, capacity: float) -> float:
    """The number of steps to a target at the very least, if a step can raise the level by `capacity` now.

    Gradients grow as a model forgets: those of the cross-entropy about as the loss does, while it is small. So the
    level is taken to rise by a share of itself. One that is 0 or less grows from nothing known: a tenth of the straight
    way is taken then.

    Example:
        >>> count_least(1.0, 8.0, 1.0), count_least(0.0, 8.0, 0.1)
        (3.0, 8.0)
    """
    if level >= target:
        return 0.0
    if capacity <= 0:
        return math.inf
    straight = (target - level) / capacity
    return straight / 10 if level <= 0 else min(straight, math.log(target / level) / math.log1p(capacity / level))


def warn_about_start(level: str, target: str, doubt: str) -> None:
    """Warn where the level is at the target already; `doubt` says what speaks against it, if anything does."""
    nothing = "there is nothing to forget. Check the forget set, or choose a higher target."
    why = f"the mean has nothing to rise, but {doubt}." if doubt else nothing
    rank_zero_warn(f"{level} before the first step, and the target only {target}: {why}")


def warn_about_budget(trainer: Trainer, optimizer: HAMUOptimizer, report: StepReport, every_n_steps: int) -> None:
    """Warn at the first step where the trust region is too small for a target in the steps that the fit has."""
    left = _compat.count_steps_left(trainer) / every_n_steps
    step = report.coefficients
    if left < _FEW:
        return
    for name in optimizer.rule.target_quotas:
        aim = optimizer.aim_of(name)
        if name not in step.groups or aim.level is None or aim.target is None or aim.taken or aim.exchange is not None:
            continue  # what a step gains is not known yet where something else than the loss is raised
        place = step.groups.index(name)
        # No allocation, and no order of steps, gives more than the longest step along the gradient.
        squares = step.gramian[:, place, place].sum() * step.radius.square().sum()
        level, target, capacity = (float(x) for x in (aim.level, aim.target, squares.sqrt()))
        least = count_least(level, target, capacity)
        if _FAR * left < least < math.inf:
            larger = _name_larger(optimizer.rule.radius, least / max(left, 1))
            rank_zero_warn(
                f"The target of {name!r} is out of reach of this fit: it is at {level:.3g} and should come to "
                f"{target:.3g}, and the trust region allows {capacity:.2g} in a step now, so that about "
                f"{math.ceil(least)} steps are needed even if gradients grow as the loss does. The fit has "
                f"{math.floor(left)}. Give it more steps, or a larger radius{larger}."
            )


def _name_larger(radius: Radius, times: float) -> str:
    """A radius of the same kind that is so much larger, in words; empty where there is none."""
    fraction = getattr(radius, "fraction", None)
    return "" if fraction is None else f", such as {type(radius).__name__}({fraction * times:.1g})"
