"""The way of the forget loss to its target: planned, measured, and ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from hamu_lightning.callbacks import _compat, _compat_loaders
from hamu_lightning.callbacks.goals._evidence import gather_evidence
from hamu_lightning.callbacks.goals._gauge import Gauge
from hamu_lightning.callbacks.goals._kept_weights import KeptWeights
from hamu_lightning.callbacks.goals._pass_mean import PassMean
from hamu_lightning.callbacks.goals._planning import plan_steps
from hamu_lightning.callbacks.goals._reading import Excerpt, Reader, read_beside
from hamu_lightning.callbacks.goals._surroundings import AnswerTarget, Surroundings
from hamu_lightning.callbacks.goals._targets import REACHED, Holdout, Target, as_target
from hamu_lightning.callbacks.goals._trail import Trail
from hamu_lightning.callbacks.passes import ForgetPass, MeasuringLoader
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.optim import HAMUOptimizer

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# From this share of the target on, the forget loss is measured before each step, not only every so many.
_NEAR = 0.7
_MEASURE_EVERY = 10
# A step that ends beyond this is tried again, where steps are verified.
_TOO_FAR = 1.1
# And from here on, advice is due.
_FAR_BEYOND = 1.5
_MORE = "Give it more steps, or a larger radius: HAMUQ(TargetQuota(...), radius=RelativeRadius(3e-3))."


class Approach:
    """Measures the target, follows the forget loss, and tells when the one has reached the other.

    Levels are those of the model in evaluation mode: measured on the forget set itself every 10 steps, and before each
    step from 0.7 of the target on; in between the optimizer's `Aim` adds what the steps promise. Batches run in the
    mode that the module trains in, where dropout makes their losses higher: their rise only tells when to measure
    (`Trail`). Of a set of more than 32 batches, 32 are measured that are spread over it; the target counts as reached
    only where the loss of all of it has come there, and, with held-out data, where the ranks of single samples do not
    speak against it (`Evidence`). Where they do, the fit goes on with the mean held at its target. A set that cannot be
    read beside the fit is judged by what was seen of it, batch by batch in evaluation mode, in a whole pass.

    A step that ends more than a tenth beyond the target is taken back (weights and the optimizer's state), and the next
    one is half as long; where steps are not verified, the nearer of the last two counts.

    Args:
        trainer: The trainer, with its loaders set up.
        optimizer: The optimizer.
        group: A group for which its rule has a `TargetQuota`.
        forget_pass: What runs batches through the module without a trace.
        forget: The forget loader as the user gave it: every process reads all of it. None where the training loader
            brings its batches.
        protected: The loaders of the protected groups.
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
        protected: Sequence[Any],
        every_n_steps: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        quota = optimizer.rule.target_quotas[group]
        self._trainer, self._optimizer, self._forget_pass = trainer, optimizer, forget_pass
        self._aim = optimizer.aim_of(group)
        self._target = as_target(quota.target)
        self._reader = Reader(trainer)
        self._gauge = Gauge(trainer, forget_pass, self._reader, self._target)
        if forget is None:
            forget = _compat_loaders.train_loader_parts(trainer)[group]
        self._given, self._protected, read = forget, protected, read_beside(forget)
        self._forget = read if isinstance(read, MeasuringLoader) else None
        self._seen, self._trail = PassMean(), Trail()
        forget_pass.sees_levels = self._forget is None
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
        known = (state or {}).get("evidence", {})
        self.evidence = gather_evidence(trainer, forget_pass, forget, self._target, self._reader, known)
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
        is_due = aim.level is None or aim.taken % _MEASURE_EVERY == 0 or self._is_near(target)
        if self._forget is not None and is_due:
            aim.level = self._look_at_forget_set(self._forget, target, step, args, kwargs)
            self._trail.mark(aim.level)
        elif self._forget is None:
            self._know(self._seen.mean)
        self.evidence.begin(step, args, kwargs)
        is_there = not self.is_lost and self.is_at_target
        self.is_reached = is_there and self.evidence.confirms(aim.taken, step, args, kwargs)
        if is_there and aim.taken == 0:
            self._warn_at_the_start(target)
        if not lands:
            return
        if self.is_reached or (is_there and self._is_too_far(target)):
            self._land(self._known, target)
        elif self._forget is not None and aim.level is not None and self._is_near(target):
            self._kept.keep()
            self._kept_level = aim.level
        else:
            self._kept.release()

    @property
    def _what(self) -> str:
        return self._target.what if isinstance(self._target, Target) else Target.what

    def _is_near(self, target: Tensor) -> bool:
        levels = (self._aim.level, self._trail.estimate)
        return any(level is not None and bool(level >= _NEAR * target) for level in levels)

    def _warn_at_the_start(self, target: Tensor) -> None:
        found = f"The {self._what} is {float(self._known):.4g} before the first step, and the target only "
        found += f"{float(target):.4g}{self.evidence.intervals()}: "
        if self.is_reached:
            rank_zero_warn(f"{found}there is nothing to forget. Check the forget set, or choose a higher target.")
        else:
            rank_zero_warn(
                f"{found}the mean has nothing to rise, but single samples are remembered: {self.evidence.advice}."
            )

    def _is_too_far(self, target: Tensor) -> bool:
        return self._optimizer.referee is not None and bool(self._known > _TOO_FAR * target)

    def observe(self, loss: Tensor) -> None:
        """Take the loss of a forget batch in: that of this process, weighted by its share of the samples."""
        if self._forget is not None:
            self._trail.add(self._trainer.strategy.reduce(loss, reduce_op="mean"))
            return
        assert self._forget_pass.level is not None
        level = self._trainer.strategy.reduce(self._forget_pass.level, reduce_op="mean")
        self._aim.observe(level)
        stream = self._forget_pass.stream
        self._seen.add(level, self._trainer.current_epoch if stream is None else stream.state_dict()["pass"])

    def conclude(self) -> None:
        """Measure the forget loss at the end of the fit, at the weights that it leaves."""
        if self._forget is None:
            self._know(self._seen.mean)
        elif self._last_step is not None and self._level_at != self._aim.taken:
            self._know(self._gauge.mean_loss(self._forget, *self._last_step))

    def conclude_evidence(self) -> None:
        """Read all samples at the end of the fit, however it ended."""
        if self._last_step is not None:
            self.evidence.conclude(*self._last_step)

    def look_after(self, *step: Any) -> None:
        """Measure a loss again that had reached its target: steps for other groups have moved the weights since.

        Args:
            step: As for `look`; those of the last call by default.
        """
        step = step or self._last_step or ()
        if self._forget is not None and step:
            level = self._gauge.mean_loss(self._forget, *step)
            self._know(level)
            self._aim.level = level
            self._check(level, f"the {self._what}", self._given, step)
        self.is_reached = not self.is_lost and self.is_at_target

    def start_over(self) -> None:
        """The weights went back to an earlier step: what was measured since says nothing of them."""
        self._kept.release()
        self.evidence.clear()
        self._seen, self._trail, self._aim.level = PassMean(), Trail(), None
        self._level, self._level_at, self._kept_level = None, -1, None
        self._not_finite, self.is_reached, self.is_lost = "", False, False

    def close(self) -> None:
        """Let the workers go that read for measurements."""
        self._reader.close()
        self.evidence.close()
        if self._forget is not None:
            self._forget.close()

    @property
    def is_at_target(self) -> bool:
        """Whether the forget loss on all of the set, where it was measured last, has reached the target."""
        level, target = self._level, self._aim.target
        if level is None or target is None or self._level_at != self._aim.taken:
            return False
        return bool(level >= REACHED * target)

    @property
    def is_short(self) -> bool:
        """Whether the target cannot be believed to be reached."""
        return not self.is_at_target or self.evidence.contradicts

    def describe_short(self) -> str:
        """How far the loss came where it is short of its target, in words with the cure; reads the host."""
        if self.is_at_target:
            return f"{self.describe()}. {self.evidence.judge()}."
        return f"{self.describe()}. {_MORE}"

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
        return (
            f"{self._what} {level:.4g}{how} for a target of {target:.4g}{advice}{self._not_finite}"
            f"{self.evidence.intervals()}"
        )

    def describe_evidence(self) -> str:
        """What single samples show at the end, in words."""
        return self.evidence.describe(is_reached=self.is_at_target)

    def state_dict(self) -> dict[str, Any]:
        """Return what the way back needs, and what was seen of a set that cannot be measured."""
        kept = self._kept.state_dict()
        evidence = {} if _compat.has_ended(self._trainer) else self.evidence.state_dict()
        numbers = {"seen": self._seen.state_dict(), "trail": self._trail.state_dict(), "evidence": evidence}
        return {**numbers, **({"kept": kept, "kept_level": self._kept_level} if kept else {})}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._seen.load_state_dict(state.get("seen", {}))
        self._trail.load_state_dict(state.get("trail", {}))
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
            if target.every:
                self.evidence.watch(level, *step)
        assert aim.target is not None
        return aim.target

    def _measure_target(self, target: Target, *step: Any) -> Tensor:
        if not isinstance(target, AnswerTarget):
            return self._gauge.measure(target.measure, *step)
        around = Surroundings(self._trainer, self._reader, self._given, self._protected, self._gauge.measure, step)
        end = target.prepare(around)
        if around.held_out is not None:
            self.evidence.take_held_out(around.held_out)
        return end

    def _look_at_forget_set(self, forget: MeasuringLoader, target: Tensor, *step: Any) -> Tensor:
        """The loss of the set, or of a part of a large one: then it is not known on all of it."""
        excerpt = Excerpt(forget)
        level = self._gauge.mean_loss(excerpt, *step)
        if not excerpt.is_all and not bool(level < REACHED * target):
            level = self._gauge.mean_loss(forget, *step)
            self._know(level)
        elif excerpt.is_all:
            self._know(level)
        self._check(level, f"the {self._what}", self._given, step)
        return level

    def _check(self, level: Tensor, what: str, data: Any, step: tuple[Any, ...]) -> None:
        """Notice a level that is not finite, and find out where."""
        if bool(level.isfinite()):
            return
        self._not_finite = self._gauge.find_not_finite(data, *step)
        if self._aim.taken == 0:
            raise HAMUStateError(
                f"Expected {what} to be a finite number before the first step, but got {level}{self._not_finite}."
            )
        self.is_lost = True

    def _land(self, level: Tensor, target: Tensor) -> None:
        """Take the last step back if it went too far: to try a shorter one, or because the target was nearer before."""
        before, referee = self._kept_level, self._optimizer.referee
        if before is None or not self._kept.are_there:
            return
        goes_on = referee is not None and bool(level > _TOO_FAR * target)
        if goes_on or bool(level - target > target - before):
            self._kept.restore()
            self.evidence.clear()
            self._aim.level = before
            # Of a large set it may have been measured on a part.
            self._level, self._level_at = before, self._aim.taken if self._is_small else -1
        if goes_on and referee is not None:
            referee.region /= 2
            self.is_reached = False
        else:
            self._kept.release()
            self.conclude()
