"""The way of the forget loss to its target: planned, measured, and ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks._refusal import HAMUMisconfigurationError
from hamu_lightning.callbacks.goals._kept_weights import KeptWeights
from hamu_lightning.callbacks.goals._pass_mean import PassMean
from hamu_lightning.callbacks.goals._reading import Excerpt, Reader, in_order, one_by_one, read_beside, shorten
from hamu_lightning.callbacks.goals._surroundings import AnswerTarget, Surroundings
from hamu_lightning.callbacks.goals._targets import REACHED, Holdout, Target, as_target
from hamu_lightning.callbacks.passes import ForgetPass, MeasuringLoader
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


class Approach:
    """Measures the target, follows the forget loss, and tells when the one has reached the other.

    The optimizer's `Aim` follows the loss from batch to batch. Batches are noisy, and what a step promises holds for
    its own batch; so the loss is also measured on the forget set itself: every 10 steps, and before each step from 0.7
    of the target on. Of a set of more than 32 batches, 32 that are spread over it; the target counts as reached only
    where the loss of all of it has come there. A set that cannot be read beside the fit is judged by what was seen of
    it in a whole pass.

    A step that ends more than a tenth beyond the target is taken back (weights and the optimizer's state), and the next
    one is half as long; where steps are not verified, the nearer of the last two counts.

    Args:
        trainer: The trainer, with its loaders set up.
        optimizer: The optimizer.
        group: A group for which its rule has a `TargetQuota`.
        forget_pass: What runs batches through the module without a trace.
        forget: The forget loader as the user gave it: every process reads all of it. None where the training loader
            brings its batches.
        every_n_steps: Every how many steps of the trainer one is a combined one.
        state: What `state_dict` returned in the run that this one continues.

    Attributes:
        is_reached: Whether the forget loss has reached the target.
        is_lost: Whether the model gives no finite loss any more.

    Raises:
        HAMUMisconfigurationError: If nothing says in how many steps, or there is nothing to measure the target on.
    """

    def __init__(
        self,
        trainer: Trainer,
        optimizer: HAMUOptimizer,
        group: str,
        forget_pass: ForgetPass,
        forget: Any,
        every_n_steps: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        quota = optimizer.rule.target_quotas[group]
        self._trainer, self._optimizer, self._forget_pass = trainer, optimizer, forget_pass
        self._aim = optimizer.aim_of(group)
        self._target = as_target(quota.target)
        self._reader = Reader(trainer)
        if forget is None:
            forget = _compat.train_loader_parts(trainer)[group]
        self._given, read = forget, read_beside(forget)
        self._forget = read if isinstance(read, MeasuringLoader) else None
        self._seen = PassMean()
        # The numbers of a run that this one continues stand: it is to go on as if it had not been interrupted.
        if self._aim.steps is None or quota.steps is not None:
            self._aim.steps = plan_steps(trainer, quota, self._aim.taken, every_n_steps)
        self._kept = KeptWeights(optimizer)
        self._kept_level: Tensor | None = None
        self._level: Tensor | None = None  # measured on all there is, after so many steps
        self._level_at = -1
        self._not_finite = ""
        self._last_step: tuple[Any, ...] | None = None
        self.is_reached = self.is_lost = False
        self._load(state or {})
        if isinstance(self._target, Holdout):
            self._reader.warn_about_shared_samples(self._target.data, forget)
        if not isinstance(read, MeasuringLoader):
            rank_zero_warn(
                f"The target of {group!r} is judged by the mean loss over a whole pass, as it was seen while the "
                f"weights moved, and so later than it is reached. {read}"
            )

    def look(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, lands: bool) -> None:
        """Measure what has to be measured before the forget pass of a step; reads the host.

        Args:
            step: The strategy's `training_step`.
            args: The arguments of the retain batch.
            kwargs: Likewise.
            lands: Whether a step that went too far is taken back: not with several groups, whose step it was as well.
        """
        self._last_step = step, (None, *args[1:]), kwargs
        aim, target = self._aim, self._look_at_target(step, args, kwargs)
        is_near = aim.level is not None and bool(aim.level >= _NEAR * target)
        if self._forget is not None and (is_near or aim.taken % _MEASURE_EVERY == 0):
            aim.level = self._look_at_forget_set(self._forget, target, step, args, kwargs)
        elif self._forget is None:
            self._know(self._seen.mean)
        self.is_reached = not self.is_lost and self.is_at_target
        if self.is_reached and aim.taken == 0:
            rank_zero_warn(
                f"The forget loss is {float(self._known):.4g} before the first step, and the target only "
                f"{float(target):.4g}: there is nothing to forget. Check the forget set, or choose a higher target."
            )
        if not lands:
            return
        if self.is_reached:
            self._land(self._known, target)
        elif is_near and self._forget is not None and aim.level is not None:
            self._kept.keep()
            self._kept_level = aim.level
        else:
            self._kept.release()

    def observe(self, loss: Tensor) -> None:
        """Take the loss of a forget batch in: that of this process, weighted by its share of the samples."""
        loss = self._trainer.strategy.reduce(loss, reduce_op="mean")
        self._aim.observe(loss)
        if self._forget is None:
            stream = self._forget_pass.stream
            self._seen.add(loss, self._trainer.current_epoch if stream is None else stream.state_dict()["pass"])

    def conclude(self) -> None:
        """Measure the forget loss at the end of the fit, at the weights that it leaves."""
        if self._forget is None:
            self._know(self._seen.mean)
        elif self._last_step is not None and self._level_at != self._aim.taken:
            self._know(self._measure(self._mean_loss_on(self._forget), *self._last_step))

    def look_after(self, *step: Any) -> None:
        """Measure a loss again that had reached its target: steps for other groups have moved the weights since.

        Args:
            step: As for `look`; those of the last call by default.
        """
        step = step or self._last_step or ()
        if self._forget is not None and step:
            level = self._measure(self._mean_loss_on(self._forget), *step)
            self._know(level)
            self._aim.level = level
            self._check(level, "the forget loss", self._given, step)
        self.is_reached = not self.is_lost and self.is_at_target

    def close(self) -> None:
        """Let the workers go that read for measurements."""
        self._reader.close()
        if self._forget is not None:
            self._forget.close()

    @property
    def is_at_target(self) -> bool:
        """Whether the forget loss on all of the set, where it was measured last, has reached the target."""
        level, target = self._level, self._aim.target
        if level is None or target is None or self._level_at != self._aim.taken:
            return False
        return bool(level >= REACHED * target)

    def levels(self) -> dict[str, Tensor]:
        """The forget loss as it is followed, and the target, for the log."""
        levels = {"forget_level": self._aim.level, "target": self._aim.target}
        return {name: level for name, level in levels.items() if level is not None}

    def describe(self) -> str:
        """How far the forget loss came, in words: where it was measured last on the whole set; reads the host."""
        if self._level is None or self._aim.target is None:
            return "no step towards the target" if self._forget is not None else "no whole pass towards the target"
        level, target = float(self._level), float(self._aim.target)
        how = "" if self._forget is not None else " (the mean that was seen in the last whole pass)"
        advice = (
            "" if level <= _FAR_BEYOND * target else ", far beyond it: verified steps or a smaller radius prevent that"
        )
        return f"forget loss {level:.4g}{how} for a target of {target:.4g}{advice}{self._not_finite}"

    def state_dict(self) -> dict[str, Any]:
        """Return what the way back needs, and what was seen of a set that cannot be measured."""
        kept = self._kept.state_dict()
        return {"seen": self._seen.state_dict(), **({"kept": kept, "kept_level": self._kept_level} if kept else {})}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._seen.load_state_dict(state.get("seen", {}))
        self._kept.load_state_dict(state.get("kept", {}))
        self._kept_level = state.get("kept_level")

    @property
    def _is_small(self) -> bool:
        return self._forget is not None and Excerpt(self._forget).is_all

    @property
    def _known(self) -> Tensor:
        assert self._level is not None
        return self._level

    def _know(self, level: Tensor | None) -> None:
        self._level, self._level_at = level, self._aim.taken

    def _look_at_target(self, *step: Any) -> Tensor:
        aim, target = self._aim, self._target
        if isinstance(target, float):
            aim.target = torch.tensor(target)
        elif aim.target is None or (target.every and aim.taken % target.every == 0):
            aim.target = level = self._measure_target(target, *step)
            self._check(level, f"the target {target}", target.data if isinstance(target, Holdout) else (), step)
        assert aim.target is not None
        return aim.target

    def _measure_target(self, target: Target, *step: Any) -> Tensor:
        if not isinstance(target, AnswerTarget):
            return self._measure(target.measure, *step)
        return target.prepare(Surroundings(self._trainer, self._reader, self._given, self._measure, step))

    def _look_at_forget_set(self, forget: MeasuringLoader, target: Tensor, *step: Any) -> Tensor:
        """The loss of the set, or of a part of a large one: then it is not known on all of it."""
        excerpt = Excerpt(forget)
        level = self._measure(self._mean_loss_on(excerpt), *step)
        if not excerpt.is_all and not bool(level < REACHED * target):
            level = self._measure(self._mean_loss_on(forget), *step)
            self._know(level)
        elif excerpt.is_all:
            self._know(level)
        self._check(level, "the forget loss", self._given, step)
        return level

    def _mean_loss_on(self, batches: Iterable[Any]) -> Callable[..., Tensor]:
        # As any target is measured, so that both are in one unit.
        return lambda module, mean_loss, batch: mean_loss(batches)

    def _measure(self, level_of: Callable[..., Any], *step: Any) -> Tensor:
        strategy = self._trainer.strategy

        def read(module: Any, mean_loss: Callable[[Iterable[Any]], Tensor], batch: Any) -> Any:
            def mean(data: Any) -> Tensor:
                return mean_loss(data if isinstance(data, MeasuringLoader | Excerpt) else self._reader.open(data))

            return level_of(module, mean, batch)

        level = self._forget_pass.measure(read, *step)
        if level.numel() != 1:
            raise HAMUStateError(f"Expected {self._target} to be one number, but got {level}.")
        level = level.reshape(()).to(strategy.root_device, widest_float(strategy.root_device))
        # Processes may have summed in different orders; they have to decide alike.
        return strategy.reduce(level, reduce_op="mean")

    def _check(self, level: Tensor, what: str, data: Any, step: tuple[Any, ...]) -> None:
        """Notice a level that is not finite, and find out where."""
        if bool(level.isfinite()):
            return
        self._not_finite = self._find_not_finite(self._reader.find(data), step)
        if self._aim.taken == 0:
            raise HAMUStateError(
                f"Expected {what} to be a finite number before the first step, but got {level}{self._not_finite}."
            )
        self.is_lost = True

    def _find_not_finite(self, loader: Any, step: tuple[Any, ...]) -> str:
        """Which samples of a Dataset, or which batches, give no finite loss, in words; empty where it is not known."""
        ordered = in_order(loader)
        if ordered is None:
            if not isinstance(loader, list | tuple) or not loader:
                return ""
            self._measure(lambda module, mean_loss, batch: mean_loss(MeasuringLoader(loader)), *step)
            return f"; not finite in the batches at {shorten(self._forget_pass.not_finite)}"
        batches, size = ordered
        self._forget_pass.measure(lambda module, mean_loss, batch: mean_loss(batches), *step)
        n = len(loader.dataset)
        found = [i for b in self._forget_pass.not_finite for i in range(b * size, min((b + 1) * size, n))]
        if len(found) == n:
            return "; in no batch it is finite"
        try:
            self._forget_pass.measure(lambda module, mean_loss, batch: mean_loss(one_by_one(loader, found)), *step)
        except Exception:  # some modules take no batch of one sample
            return f"; not finite in batches with the samples at {shorten(found)} of the Dataset"
        found = [found[i] for i in self._forget_pass.not_finite] or found
        return f"; not finite in the samples at {shorten(found)} of the Dataset"

    def _land(self, level: Tensor, target: Tensor) -> None:
        """Take the last step back if it went too far: to try a shorter one, or because the target was nearer before."""
        before, referee = self._kept_level, self._optimizer.referee
        if before is None or not self._kept.are_there:
            return
        goes_on = referee is not None and bool(level > _TOO_FAR * target)
        if goes_on or bool(level - target > target - before):
            self._kept.restore()
            self._aim.level = before
            # Of a large set it may have been measured on a part.
            self._level, self._level_at = before, self._aim.taken if self._is_small else -1
        if goes_on and referee is not None:
            referee.region /= 2
            self.is_reached = False
        else:
            self._kept.release()
            self.conclude()


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
