"""The way of the forget loss to its target: planned, measured, and ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks._refusal import HAMUMisconfigurationError
from hamu_lightning.callbacks.goals._kept_weights import KeptWeights
from hamu_lightning.callbacks.goals._targets import REACHED, Holdout, Target, as_target
from hamu_lightning.callbacks.passes import ForgetPass, count_shared_samples
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.gramian import widest_float
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.rules import TargetQuota

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# A target is approached over this share of the steps; the rest is left to settle.
_APPROACH = 2 / 3
# From this share of the target on, the forget loss is measured before each step, not only every so many.
_NEAR = 0.7
_MEASURE_EVERY = 10
# A step that ends beyond this is tried again, where steps are verified.
_TOO_FAR = 1.1
# And from here on, advice is due.
_FAR_BEYOND = 1.5
# Of a large forget set so many batches are measured.
_MOST_BATCHES = 32


class Approach:
    """Measures the target, follows the forget loss, and tells when the one has reached the other.

    The optimizer's `Aim` follows the loss from batch to batch. Batches are noisy, and what a step promises holds for
    its own batch; so the loss is also measured on the forget set itself: every 10 steps, and before each step from 0.7
    of the target on. A step that ends more than a tenth beyond the target is taken back, and the next one is half as
    long; where steps are not verified, the nearer of the last two counts.

    Args:
        trainer: The trainer, with its loaders set up.
        optimizer: The optimizer.
        group: A group for which its rule has a `TargetQuota`.
        forget_pass: What runs batches through the module without a trace.
        forget: The forget loader as the user gave it: every process reads all of it.
        every_n_steps: Every how many steps of the trainer one is a combined one.

    Attributes:
        is_reached: Whether the forget loss has reached the target.
        is_lost: Whether the model gives no finite loss any more.

    Raises:
        HAMUMisconfigurationError: If nothing says in how many steps.
    """

    def __init__(
        self,
        trainer: Trainer,
        optimizer: HAMUOptimizer,
        group: str,
        forget_pass: ForgetPass,
        forget: Any,
        every_n_steps: int,
    ) -> None:
        quota = optimizer.rule.target_quotas[group]
        self._trainer, self._optimizer, self._forget_pass = trainer, optimizer, forget_pass
        self._aim = optimizer.aim_of(group)
        self._target = as_target(quota.target)
        self._forget = Holdout(Excerpt(forget)) if can_be_read_again(forget) else None
        self._aim.steps = plan_steps(trainer, quota, self._aim.taken, every_n_steps)
        self._kept = KeptWeights(optimizer)
        self._kept_level: Tensor | None = None
        self.is_reached = self.is_lost = False
        if isinstance(self._target, Holdout):
            warn_about_shared_samples(self._target.loader, forget)

    def look(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, lands: bool) -> None:
        """Measure what has to be measured before the forget pass of a step; reads the host.

        Args:
            step: The strategy's `training_step`.
            args: The arguments of the retain batch.
            kwargs: Likewise.
            lands: Whether a step that went too far is taken back: not with several groups, whose step it was as well.
        """
        aim, target = self._aim, self._look_at_target(step, args, kwargs)
        is_near = aim.level is not None and bool(aim.level >= _NEAR * target)
        if self._forget is not None and (is_near or aim.taken % _MEASURE_EVERY == 0):
            aim.level = self._measure(self._forget, step, args, kwargs)
        if aim.level is None:
            return
        self.is_reached = not self.is_lost and self.is_at_target
        if self.is_reached and aim.taken == 0:
            rank_zero_warn(
                f"The forget loss is {float(aim.level):.4g} before the first step, and the target only "
                f"{float(target):.4g}: there is nothing to forget. Check the forget set, or choose a higher target."
            )
        if not lands:
            return
        if self.is_reached:
            self._land(aim.level, target)
        elif is_near and self._forget is not None:
            self._kept.keep()
            self._kept_level = aim.level

    def observe(self, loss: Tensor) -> None:
        """Take the loss of a forget batch in: that of this process, weighted by its share of the samples."""
        self._aim.observe(self._trainer.strategy.reduce(loss, reduce_op="mean"))

    @property
    def is_at_target(self) -> bool:
        """Whether the forget loss, as far as it is known, counts as having reached the target; reads the host."""
        level, target = self._aim.level, self._aim.target
        return level is not None and target is not None and bool(level >= REACHED * target)

    def levels(self) -> dict[str, Tensor]:
        """The forget loss as it is followed, and the target, for the log."""
        levels = {"forget_level": self._aim.level, "target": self._aim.target}
        return {name: level for name, level in levels.items() if level is not None}

    def describe(self) -> str:
        """How far the forget loss came, in words; reads the host."""
        aim = self._aim
        if aim.level is None or aim.target is None:
            return "no step towards the target"
        level, target = float(aim.level), float(aim.target)
        advice = (
            "" if level <= _FAR_BEYOND * target else ", far beyond it: verified steps or a smaller radius prevent that"
        )
        return f"forget loss {level:.4g} for a target of {target:.4g}{advice}"

    def _look_at_target(self, *step: Any) -> Tensor:
        aim, target = self._aim, self._target
        if isinstance(target, float):
            aim.target = torch.tensor(target)
        elif aim.target is None or (target.every and aim.taken % target.every == 0):
            aim.target = self._measure(target, *step)
        return aim.target

    def _measure(self, target: Target, *step: Any) -> Tensor:
        strategy = self._trainer.strategy
        level = self._forget_pass.measure(target.measure, *step)
        if level.numel() != 1:
            raise HAMUStateError(f"Expected {target} to be one number, but got {level}.")
        level = level.reshape(()).to(strategy.root_device, widest_float(strategy.root_device))
        # Processes may have summed in different orders; they have to decide alike.
        level = strategy.reduce(level, reduce_op="mean")
        if not bool(level.isfinite()):
            what = "the forget loss" if target is self._forget else f"the target {target}"
            if self._aim.taken == 0:
                raise HAMUStateError(f"Expected {what} to be a finite number before the first step, but got {level}.")
            self.is_lost = True
        return level

    def _land(self, level: Tensor, target: Tensor) -> None:
        """Take the last step back if it went too far: to try a shorter one, or because the target was nearer before."""
        before, referee = self._kept_level, self._optimizer.referee
        if before is None:
            return
        goes_on = referee is not None and bool(level > _TOO_FAR * target)
        if goes_on or bool(level - target > target - before):
            self._kept.restore()
            self._aim.level = before
        if goes_on and referee is not None:
            referee.region /= 2
            self.is_reached = False


@dataclass(frozen=True)
class Excerpt:
    """The first batches of a loader, anew at each `iter()`."""

    loader: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        return islice(self.loader, _MOST_BATCHES)


def can_be_read_again(loader: Any) -> bool:
    """Whether a second pass over a loader leaves the one that is under way alone."""
    if isinstance(loader, DataLoader):
        return not (loader.persistent_workers or isinstance(loader.dataset, IterableDataset))
    return isinstance(loader, list | tuple)


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


def warn_about_shared_samples(holdout: Any, forget: Any) -> None:
    """Warn where held-out data is to be forgotten as well, as far as it can be seen."""
    shared = count_shared_samples(holdout, forget)
    if shared:
        rank_zero_warn(
            f"The held-out data of the target and the forget set share {shared} samples of one Dataset: the target "
            "will run away as the model forgets. Hold other samples out."
        )
