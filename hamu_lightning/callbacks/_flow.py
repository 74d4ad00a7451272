"""The flow of one batch: the passes of the other groups, the retain pass, the step, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks._checks import warn_about_guess
from hamu_lightning.callbacks._group import Group
from hamu_lightning.callbacks._parts import Parts
from hamu_lightning.callbacks._watchdog import Watchdog
from hamu_lightning.callbacks.forecast import FitPreflight, PreflightReport
from hamu_lightning.callbacks.goals import StopReason, look_at_loss, warn_about_budget
from hamu_lightning.callbacks.passes import FrozenBatchNorm, NoLossError, detached_loss, split_batch, wrap_step
from hamu_lightning.objectives import ModuleLoss
from hamu_lightning.optim import Plan, StepReport
from hamu_lightning.solvers import GroupCoefficients


class Flow:
    """Pairs each retain batch with one of each other group, window of accumulation by window.

    Args:
        parts: The parts of the fit.

    Attributes:
        batchnorm: Keeps BatchNorm layers in evaluation mode.
        preflight_report: What the preflight found, where there was one.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.batchnorm = FrozenBatchNorm()
        self.preflight_report: PreflightReport | None = None
        self._preflight: FitPreflight | None = None
        self._watchdog: Watchdog | None = None
        self._applied = parts.optimizer.applied_steps
        # The accumulation window: micro-batches so far, those with forget passes, whether the last one gave a loss,
        # whether the window will be combined, and the retain losses, 0-d each.
        self._window, self._passed, self._gave_loss, self._combines = 0, 0, False, True
        self._retain_losses: list[Tensor] = []
        # The module's own losses in their place, where a ceiling is for these and an objective is lowered.
        is_other = not isinstance(parts.settings.retain_objective, ModuleLoss | None)
        self._heeds_retain_loss = is_other and look_at_loss(parts.settings.stop_on, "retain")
        self._ceiling_losses: list[Tensor] = []
        self._reported = parts.optimizer.last_step
        # Whether the first loss is still to come that says whether the model is a trained one.
        self._is_first = False

    def start(self) -> None:
        """Prepare for the first batch; the loaders of all groups are there now."""
        parts = self._parts
        if parts.settings.preflight:
            around = parts.trainer, parts.optimizer, parts.groups.loader, parts.settings.seed
            self._preflight = FitPreflight(*around, parts.raised)
        self._watchdog = Watchdog(parts.trainer, parts.optimizer)
        self._applied = parts.optimizer.applied_steps
        self._is_first = not parts.is_resumed and parts.settings.retain_objective is None
        self.settle()  # steps that waited when a checkpoint was saved

    def start_epoch(self) -> None:
        """Open a new window, as Lightning does, and compare the whole module again at the next forget pass."""
        optimizer, groups = self._parts.optimizer, self._parts.groups
        self._window = 0
        if optimizer.has_forget_gradient:  # of a window that was cut short
            optimizer.release_forget()
            groups.take_all_next()
        groups.guard.look_again()
        self.batchnorm.look_again()

    def around_step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the passes of the other groups, then the retain pass as it is.

        Args:
            step: The strategy's `training_step`.
            args: The arguments of the retain batch.
            kwargs: Likewise.
        """
        parts, trainer, settings = self._parts, self._parts.trainer, self._parts.settings
        batches: Mapping[str, Any] = {}
        if parts.groups.are_in_batch:
            names = parts.optimizer.rule.groups
            batches = dict(zip(names, split_batch(args[0], names), strict=True))
            _compat.set_foreground_batch(trainer, batches["retain"])
            args = (batches["retain"], *args[1:])
        if _compat.skips_backward(trainer):
            self.batchnorm.thaw()
            self._combines = False
            parts.optimizer.plan_step("retain_only")
            return step(*args, **kwargs)
        if settings.passes.batchnorm == "freeze":
            self.batchnorm.freeze(trainer.lightning_module)
        if self._window == 0:
            self._open_window()
        self._window += 1
        retain_step = wrap_step(step, settings.retain_objective, trainer)
        skipped = None
        if self._combines:
            steps = {"retain": retain_step, **parts.groups.wrap_step(step)}
            skipped = self._run_groups(steps, args, kwargs, batches)
            if self._heeds_retain_loss:
                self._ceiling_losses += parts.groups.present[0].run.see(step, args, kwargs)
        if parts.verifier is not None and self._combines:
            output = parts.verifier.run_retain(retain_step, args, kwargs)
        else:
            output = retain_step(*args, **kwargs)
        loss = detached_loss(output)
        if skipped is not None and loss is not None:
            raise skipped
        if loss is not None and self._is_first:
            self._is_first = False
            warn_about_guess(loss, args[0])
        self._note_retain(loss)
        return output

    def _open_window(self) -> None:
        parts = self._parts
        if self._watchdog is not None:
            self._watchdog.check_optimizer()
        self._combines = parts.trainer.global_step % parts.settings.passes.every_n_steps == 0
        if parts.turns is not None:
            self._combines = parts.turns.open_window()
        self._retain_losses, self._ceiling_losses, self._passed = [], [], 0

    def _run_groups(
        self,
        steps: Mapping[str, Callable[..., Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batches: Mapping[str, Any],
    ) -> NoLossError | None:
        """Measure what is to be measured before the step, then run the pass of each group.

        Returns:
            The error of a module that gave no loss, which is none if it skips the retain batch as well: some skip by
            the number of the batch.
        """
        parts, groups = self._parts, self._parts.groups
        if self._window == 1:
            assert parts.guarding is not None
            if parts.guarding.is_due:
                self.settle()
            moved = parts.guarding.open_window(steps, args, kwargs)
            self._stop_where_it_is_over()
            for group in moved:
                self._say_moved(group)
        if self._preflight is not None:
            self._run_preflight(self._preflight, steps[groups.present[0].name], steps["retain"])
        if parts.verifier is not None and self._window == 1:
            parts.verifier.open_window(steps, {group.name: group.run for group in groups.present})
        if parts.settings.steps.sketch is not None and self._window == 1:
            parts.optimizer.recompute = groups.record(steps)
        for number, group in enumerate(groups.present):
            try:
                loss = group.run_batch(steps[group.name], args, kwargs, batches.get(group.name))
            except NoLossError as error:
                if number:
                    raise
                return error
            parts.journal.add_loss(group.name, loss)
        self._passed += 1
        return None

    def _stop_where_it_is_over(self) -> None:
        """Let the coming step not pass where the targets are reached; the message has the levels that were measured."""
        groups, stopper = self._parts.groups, self._parts.stopper
        if groups.are_all_reached:
            # The weights may have gone back to where they were nearer.
            reason = StopReason.LANDED_SHORT if groups.describe_short() else StopReason.TARGET_REACHED
            stopper.stop(reason, f"{groups.describe()}.")
        if groups.are_lost:
            stopper.stop(StopReason.NOT_FINITE, f"{groups.describe()}. Verified steps or a smaller radius prevent it.")

    def _run_preflight(
        self, preflight: FitPreflight, step: Callable[..., Any], retain_step: Callable[..., Any]
    ) -> None:
        """Predict what the run will do, and say so; leaves no trace."""
        self._preflight = None
        self.preflight_report = preflight.run(step, retain_step)
        rank_zero_info(f"\n{self.preflight_report}")  # not behind a progress bar

    def _say_moved(self, group: Group) -> None:
        """A group has met its target, and others have not; or its loss has fallen again since it left."""
        assert group.approach is not None
        journal, step = self._parts.journal, self._parts.trainer.global_step
        (journal.end_group if group.is_done else journal.begin_group)(group.name)
        what = "leaves the problem" if group.is_done else "comes back into the problem"
        rank_zero_info(f"HAMU: {group.name!r} {what} at step {step}: {group.approach.describe()}.")

    def _note_retain(self, loss: Tensor | None) -> None:
        """Count the retain loss, and tell the optimizer what its next step is to do."""
        parts = self._parts
        self._gave_loss = loss is not None
        if loss is not None:
            self._retain_losses.append(loss)
            parts.journal.add_loss("retain", loss)
        full, n = parts.trainer.accumulate_grad_batches, len(self._retain_losses)
        plan: Plan = "combine" if self._combines else "retain_only" if parts.stopper.reason is None else "drop"
        shares = n / full, self._passed / full
        parts.optimizer.plan_step(plan if n else "drop", window_shares=shares, groups=parts.groups.names)

    def prepare_forget_gradient(self) -> None:
        """Unscale and clip the other gradients, each on its own, before Lightning clips the retain gradient."""
        parts = self._parts
        if not (self._combines and self._retain_losses):
            return
        scaler = _compat.grad_scaler(parts.trainer)
        if scaler is not None:
            if not self._gave_loss:  # Lightning calls neither the scaler nor `step` then
                return
            parts.optimizer.unscale_forget_(scaler)
        if _compat.clips_gradients(parts.trainer):
            for group in parts.groups.present:
                group.run.clip()

    def approve(self, report: StepReport) -> bool:
        """Whether a step is to be applied."""
        groups, parts = self._parts.groups, self._parts
        warn_about_budget(parts.trainer, parts.optimizer, report, parts.settings.passes.every_n_steps)
        losses = self._ceiling_losses or self._retain_losses, groups.forget_losses
        return self._parts.stopper.approves(report, *losses, groups.target, groups.level)

    def end_batch(self) -> bool:
        """After a batch: log, stop, and open a new window where one has ended; return whether one has."""
        parts = self._parts
        for group in parts.groups.present:
            parts.journal.log_module(group.name, group.run.logged)
            group.run.logged = {}  # the next batch may have no pass
        if _compat.is_accumulating(parts.trainer):
            return False
        parts.optimizer.drop_step()  # does nothing unless the loss scaler has left `step` out
        if self._watchdog is not None:
            self._watchdog.check_window(had_passes=self._combines and self._passed > 0)
        self._report()
        if parts.turns is not None and self._window:
            parts.turns.close_window()
        if self._combines:
            self._close_window()
        self._settle_at_end_of_batch()
        parts.stopper.end_fit()
        if parts.guarding is not None:
            parts.guarding.close_window(was_combined=self._combines)
            if _compat.has_ended(parts.trainer):
                parts.guarding.conclude()  # before others save what the fit leaves
        self._window = 0
        parts.groups.guard.end_window()
        return True

    def _report(self) -> None:
        """Log the step of the window; none where it had none."""
        parts, report = self._parts, self._parts.optimizer.last_step
        more = self._numbers()
        if parts.verifier is not None:
            more |= parts.verifier.numbers()
        is_new = report is not self._reported
        if report is not None and is_new:
            applied = parts.optimizer.applied_steps
            moved, self._applied = applied - self._applied, applied
            parts.journal.add_promises(report, moved, parts.groups.without_target)
            if parts.verifier is not None:
                parts.verifier.note(report, moved)
            if isinstance(report.coefficients, GroupCoefficients):
                parts.prices.add(report.coefficients)
        turn = {} if parts.turns is None else parts.turns.numbers()
        stops = parts.stopper.reason is not None and _compat.can_stop(parts.trainer)
        parts.journal.log_step(report if is_new else None, more, turn, stops=stops)
        self._reported = report

    def publish(self) -> None:
        """At the end of an epoch, give monitors the numbers that are logged at steps, and the means over the epoch."""
        parts = self._parts
        parts.journal.publish_epoch({f"hamu/{name}": value for name, value in self._numbers().items()})

    def publish_levels(self) -> None:
        """At the end of the fit, give monitors what was measured last."""
        numbers = {f"hamu/{name}": value.detach().float() for name, value in self._numbers().items()}
        self._parts.trainer.callback_metrics.update(numbers)

    def _numbers(self) -> dict[str, Tensor]:
        """What is measured besides the steps."""
        parts = self._parts
        guarded = {} if parts.guarding is None else parts.guarding.numbers()
        return parts.stopper.numbers() | parts.groups.levels() | guarded

    def settle(self, *, judges: bool = True) -> None:
        """Judge steps that wait for it, or take them back in any case; what was seen since they began goes as well."""
        parts = self._parts
        if parts.verifier is None:
            return
        undone = parts.verifier.settle() if judges else parts.verifier.take_back()
        if undone is None:
            return
        parts.journal.take_promises_back({name: undone.promised[name] for name in undone.forgotten})
        parts.groups.start_over()
        parts.stopper.start_over(goes_on=True)
        self._applied = parts.optimizer.applied_steps

    def _settle_at_end_of_batch(self) -> None:
        """Where enough steps wait, or somebody may look at the weights: at the end of an epoch, or of the fit."""
        parts = self._parts
        if parts.verifier is None or parts.verifier.waiting is None:
            return
        ends = parts.stopper.reason is not None or parts.trainer.is_last_batch or _compat.has_ended(parts.trainer)
        if ends or parts.verifier.are_enough:
            self.settle()

    def _close_window(self) -> None:
        parts = self._parts
        parts.groups.close_window()
        if parts.verifier is not None:
            parts.verifier.close_window()
            if parts.verifier.is_lost:
                parts.stopper.stop(StopReason.PROMISES_BROKEN, f"{parts.verifier.describe()}.")
