"""The way of the forget loss to its target: planned, measured, and ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from hamu_lightning.callbacks import _compat, _compat_loaders
from hamu_lightning.callbacks.goals._confirmation import Confirm, Confirmation
from hamu_lightning.callbacks.goals._evidence import gather_evidence
from hamu_lightning.callbacks.goals._forget_level import MEASURE_EVERY, ForgetLevel
from hamu_lightning.callbacks.goals._gauge import Gauge
from hamu_lightning.callbacks.goals._landing import Landing, tell_distance
from hamu_lightning.callbacks.goals._pass_mean import PassMean
from hamu_lightning.callbacks.goals._planning import plan_steps, warn_about_start
from hamu_lightning.callbacks.goals._reading import Reader, read_beside
from hamu_lightning.callbacks.goals._targets import REACHED, Target, as_target
from hamu_lightning.callbacks.passes import ForgetPass, MeasuringLoader
from hamu_lightning.optim import HAMUOptimizer

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# From this share of the target on, the weights that it was measured at are kept, to go back to.
_NEAR = 0.7
# A step that ends beyond this is tried again, where steps are verified.
_TOO_FAR = 1.1
_MORE = "Give it more steps, or a larger radius (docs/troubleshooting.md#a-larger-radius-with-a-target)."


class Approach:
    """Measures the target, follows the forget loss, and tells when the one has reached the other.

    Levels are the module's own loss in evaluation mode, whatever is raised (`Gauge`), or what is raised where the
    target is one of that. They are measured on the forget set itself every 10 steps, and where what was measured last
    and what steps have promised since could have come to the end, on as few of its batches as it takes (`ForgetLevel`);
    in between the optimizer's `Aim` adds what the steps promise. Batches run in the mode that the module trains in,
    where dropout makes their losses higher: their rise only tells when to measure (`Trail`). The target counts as
    reached only where the loss of the whole set has come there, and, with held-out data, where the ranks of single
    samples do not speak against it (`Evidence`): then the mean is held. A set that cannot be read beside the fit is
    judged by what was seen of it in a whole pass, in evaluation mode. A step that ends more than a tenth beyond the
    target is taken back, the next is half as long (`Landing`); of steps that are not verified the nearer of two counts.

    Args:
        trainer: The trainer, with its loaders set up.
        optimizer: The optimizer.
        group: A group for which its rule has a `TargetQuota`.
        forget_pass: What runs batches through the module without a trace.
        forget: The forget loader as the user gave it; None where the training loader brings its batches.
        protected: The loaders of the protected groups.
        every_n_steps: Every how many steps of the trainer one is a combined one.
        confirm: A check of the user's own before the target counts as reached.
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
        confirm: Confirm | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        quota = optimizer.rule.target_quotas[group]
        state = state or {}
        self._trainer, self._optimizer, self._forget_pass = trainer, optimizer, forget_pass
        self._aim = optimizer.aim_of(group)
        self._target = as_target(quota.target)
        self._every = self._target.every if isinstance(self._target, Target) else 0
        self._what = self._target.what if isinstance(self._target, Target) else Target.what
        self._reader = Reader(trainer)
        self._gauge = Gauge(trainer, forget_pass, self._reader, self._target, protected)
        if forget is None:
            forget = _compat_loaders.train_loader_parts(trainer)[group]
        self._given, read = forget, read_beside(forget)
        self._forget: ForgetLevel | None = None
        if isinstance(read, MeasuringLoader):
            self._forget = ForgetLevel(self._gauge, forget_pass, read, state.get("level", {}))
        else:
            rank_zero_warn(
                f"The target of {group!r} is judged by the mean loss over a whole pass, as it was seen while the "
                f"weights moved, and so later than it is reached. {read}"
            )
        self._seen = PassMean()
        self._seen.load_state_dict(state.get("seen", {}))
        forget_pass.sees_levels, forget_pass.level_of = self._forget is None, self._gauge.judge
        # The numbers of a run that this one continues stand: it is to go on as if it had not been interrupted.
        if self._aim.steps is None or quota.steps is not None:
            self._aim.steps = plan_steps(trainer, quota, self._aim.taken, every_n_steps)
        self._landing = Landing(optimizer)
        self._landing.load_state_dict(state)
        self._level: Tensor | None = None  # measured on all there is, after so many steps
        self._level_at, self._not_finite = -1, ""
        self._last_step: tuple[Any, ...] | None = None
        self.is_reached = self.is_lost = False
        self._confirmation = Confirmation(trainer, forget_pass, confirm, state.get("confirmation", {}))
        self._aim.further = self._confirmation.further
        known = state.get("evidence", {})
        self.evidence = gather_evidence(trainer, forget_pass, forget, self._target, self._reader, known)

    @property
    def is_due(self) -> bool:
        """Whether `look` is going to measure something, or may find the target reached."""
        aim, goal = self._aim, self._aim.goal
        if self._forget is None or goal is None or (self._every and aim.taken % self._every == 0):
            return True
        return self._confirmation.is_due(aim.taken) or self._forget.is_due(aim, goal)

    def look(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, lands: bool) -> None:
        """Measure what has to be measured before the forget pass of a step; reads the host.

        Args:
            step: Runs a forget batch: the strategy's `training_step`, or an objective.
            args: The arguments of the retain batch.
            kwargs: Likewise.
            lands: Whether a step that went too far is taken back: not with several groups, whose step it was as well.
        """
        self._last_step = step, (None, *args[1:]), kwargs
        self._aim.follow(is_raised=self._gauge.judge(step) is step)
        aim, target = self._aim, self._look_at_target(step, args, kwargs)
        # While the user's own check fails, the steps aim further than the target, where it is asked again.
        is_asked = self._confirmation.is_due(aim.taken)
        goal = target if is_asked else target * aim.further
        is_due = self._forget is not None and (is_asked or self._forget.is_due(aim, goal))
        if self._forget is None:
            self._know(self._seen.mean)
            if aim.level is not None and aim.taken % MEASURE_EVERY == 0:
                aim.mark(aim.level)
        elif is_due:
            self._look_at_forget_set(self._forget, goal, step, args, kwargs)
        self.evidence.begin(step, args, kwargs)
        is_there = not self.is_lost and self.is_at_target and self._is_still_at_target(step, args, kwargs)
        is_believed = is_there and self.evidence.confirms(aim.taken, step, args, kwargs)
        self.is_reached = is_believed and self._is_confirmed(args[0])
        if is_there and aim.taken == 0:
            doubt = self._confirmation.describe() or f"single samples are remembered: {self.evidence.advice}"
            place = f"The {self._what} is {float(self._known):.4g}", f"{float(target):.4g}{self.evidence.intervals()}"
            warn_about_start(*place, "" if self.is_reached else doubt)
        if not lands:
            return
        goal = target * aim.further
        is_verified = self._optimizer.referee is not None
        if self.is_reached or (is_there and is_verified and bool(self._known > _TOO_FAR * goal)):
            self._land(self._known, goal)
        elif is_due and aim.level is not None:
            is_near = aim.exchange is not None or bool(aim.level >= _NEAR * goal)
            is_known = self._level_at == aim.taken
            self._landing.keep(aim.level if is_near else None, is_known=is_known)

    def _is_confirmed(self, batch: Any) -> bool:
        """Whether the user's own check passes; the level that the steps aim at follows it."""
        passes = self._confirmation.passes(self._aim.taken, batch)
        self._aim.further = self._confirmation.further
        return passes

    def observe(self, loss: Tensor) -> None:
        """Take the loss of a forget batch in: that of this process, weighted by its share of the samples."""
        if self._forget is not None:
            self._forget.trail.add(self._trainer.strategy.reduce(loss, reduce_op="mean"))
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
            self._know(self._forget.measure_all(*self._last_step))

    def conclude_evidence(self) -> None:
        """Read all samples at the end of the fit, however it ended, and ask the user's own check."""
        if self._last_step is None:
            return
        self.evidence.conclude(self._aim.taken, *self._last_step, is_still=self.is_reached)
        if not self.is_reached:
            self._confirmation.ask(self._aim.taken, None)

    def look_after(self, *step: Any) -> None:
        """Measure a loss again that had reached its target: steps for other groups have moved the weights since.

        Args:
            step: As for `look`; those of the last call by default.
        """
        step = step or self._last_step or ()
        if self._forget is not None and step:
            level = self._forget.measure_all(*step)
            self._know(level)
            self._aim.mark(level)
            self._check(level, f"the {self._what}", self._given, step)
        is_there = not self.is_lost and self.is_at_target and (not step or self._is_still_at_target(*step))
        self.is_reached = is_there and self._is_confirmed(None)

    def start_over(self) -> None:
        """The weights went back to an earlier step: what was measured since says nothing of them."""
        self._landing.release()
        self.evidence.clear()
        self._confirmation.forget()
        self._seen, self._aim.level = PassMean(), None
        if self._forget is not None:
            self._forget.start_over()
        self._level, self._level_at = None, -1
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
        if self._level is None or self._aim.target is None or self._level_at != self._aim.taken:
            return False
        return bool(self._level >= REACHED * self._aim.target)

    @property
    def is_short(self) -> bool:
        """Whether the target cannot be believed to be reached."""
        return not self.is_at_target or self.evidence.contradicts or bool(self._confirmation.objection)

    def describe_short(self) -> str:
        """How far the loss came where it is short of its target, in words with the cure; reads the host."""
        if self.is_at_target:
            objection = self._confirmation.describe("The mean has reached its target, but {}")
            against = (self.evidence.judge(), objection)
            return f"{self.describe()}. {' '.join(f'{fault}.' for fault in against if fault)}"
        referee = self._optimizer.referee
        is_whole = referee is None or referee.region >= 1  # in a smaller trust region a larger radius is no cure
        return f"{self.describe()}. {_MORE if is_whole else 'Give it more steps.'}"

    def levels(self) -> dict[str, Tensor]:
        """The forget loss as it is followed, and the target, for the log."""
        levels = {"forget_level": self._aim.level, "target": self._aim.goal}
        return {name: level for name, level in levels.items() if level is not None}

    def describe(self) -> str:
        """How far the forget loss came, in words, and what single samples say; reads the host."""
        return f"{self.describe_level()}{self.evidence.intervals()}"

    def describe_level(self) -> str:
        """How far the forget loss came, in words: where it was measured last on the whole set; reads the host."""
        if self._level is None or self._aim.target is None:
            return "no step towards the target" if self._forget is not None else "no whole pass towards the target"
        level, target = float(self._level), float(self._aim.target)
        how = "" if self._forget is not None else " (the mean that was seen in the last whole pass)"
        advice = tell_distance(level, target * self._aim.further, may_be_short=not self.is_reached)
        return f"{self._what} {level:.4g}{how} for a target of {target:.4g}{advice}{self._not_finite}"

    def describe_evidence(self) -> list[str]:
        """What single samples show at the end, in lines."""
        lines = self.evidence.describe(is_reached=self.is_at_target)
        return [*lines, *filter(None, [self._confirmation.describe("Not gone: {}.")])]

    def state_dict(self) -> dict[str, Any]:
        """Return what the way back needs, and what was measured and seen of the set."""
        evidence = {} if _compat.has_ended(self._trainer) else self.evidence.state_dict()
        level = {} if self._forget is None else {"level": self._forget.state_dict()}
        parts = {"seen": self._seen.state_dict(), "confirmation": self._confirmation.state_dict(), **level}
        return {**parts, "evidence": evidence, **self._landing.state_dict()}

    @property
    def _known(self) -> Tensor:
        assert self._level is not None
        return self._level

    def _know(self, level: Tensor | None) -> None:
        self._level, self._level_at = level, self._aim.taken

    def _is_still_at_target(self, *step: Any) -> bool:
        """Whether the level has come to the target at the present weights: one that follows them is measured again."""
        if self._every and self._aim.taken % self._every:
            self._look_at_target(*step, anew=True)
        return self.is_at_target

    def _look_at_target(self, *step: Any, anew: bool = False) -> Tensor:
        aim, target = self._aim, self._target
        if isinstance(target, float):
            aim.target = torch.tensor(target)
        elif aim.target is None or anew or (self._every and aim.taken % self._every == 0):
            level, held_out = self._gauge.measure_target(self._given, *step)
            if held_out is not None:
                self.evidence.take_held_out(held_out)
            aim.target = level
            self._check(level, f"the target {target}", target.data if target.has_held_out else (), step)
            if target.every:
                self.evidence.watch(level, *step)
        assert aim.target is not None
        return aim.target

    def _look_at_forget_set(self, forget: ForgetLevel, target: Tensor, *step: Any) -> None:
        # Where samples or a check spoke against the mean lately, it is only asked whether it has gone too far.
        waits = self.evidence.waits(self._aim.taken) or self._confirmation.waits(self._aim.taken)
        level = forget.measure((_TOO_FAR if waits else REACHED) * target, *step)
        if forget.value is not None:
            self._know(level)
        self._aim.mark(level)
        forget.mark(level, target, self._aim.taken)
        self._check(level, f"the {self._what}", self._given, step)

    def _check(self, level: Tensor, what: str, data: Any, step: tuple[Any, ...]) -> None:
        """Notice a level that is not finite, and find out where."""
        if bool(level.isfinite()):
            return
        self._not_finite = self._gauge.find_not_finite(level, what, data, step, is_first=self._aim.taken == 0)
        self.is_lost = True

    def _land(self, level: Tensor, target: Tensor) -> None:
        """Take steps back that went too far: to try shorter ones, or because the target was nearer before."""
        referee = self._optimizer.referee
        goes_on = referee is not None and self._landing.level is not None and bool(level > _TOO_FAR * target)
        # What was checked is what is kept.
        may_go = goes_on or (bool(level > _TOO_FAR * target) and not self._confirmation.is_there)
        before = self._landing.go_back(level, target, in_any_case=goes_on) if may_go else None
        if before is not None:
            self.evidence.clear()
            self._aim.mark(before, learns=False)
            if self._forget is not None:
                self._forget.start_over(before)
            self._level, self._level_at = before, self._aim.taken if self._landing.is_known else -1
        if goes_on and referee is not None:
            referee.region /= 2
            self.is_reached = False
        elif self._landing.level is not None:
            self._landing.release()
            self.conclude()
