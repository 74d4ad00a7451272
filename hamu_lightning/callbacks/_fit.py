"""One fit with unlearning: what HAMUCallback holds between `on_fit_start` and `teardown`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks._checks import (
    best_checkpoints,
    check_own_optimizer,
    check_sketch,
    warn_about_stale_best,
    wrap_optimizer,
)
from hamu_lightning.callbacks._forget_pass import detached_loss, split_batch
from hamu_lightning.callbacks._group import Group
from hamu_lightning.callbacks._groups import Groups
from hamu_lightning.callbacks._journal import Journal
from hamu_lightning.callbacks._objective import check_target, wrap_step
from hamu_lightning.callbacks._preflight import FitPreflight
from hamu_lightning.callbacks._preflight_report import PreflightReport
from hamu_lightning.callbacks._prices import Prices
from hamu_lightning.callbacks._stopper import Stopper
from hamu_lightning.callbacks._stopping import StopCondition, StopReason
from hamu_lightning.callbacks._turns import Turns
from hamu_lightning.callbacks._verification import Verifier, VerifySteps
from hamu_lightning.callbacks._watchdog import Watchdog
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.objectives import Objective
from hamu_lightning.optim import StepReport
from hamu_lightning.optim._engine import Plan
from hamu_lightning.rules import Rule, Schedule
from hamu_lightning.solvers import GroupCoefficients

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


@dataclass(frozen=True)
class FitSettings:
    """The arguments of HAMUCallback."""

    forget: Any
    protect: Mapping[str, Any]
    groups_per_step: int | None
    sketch: int | None
    rule: Rule | None
    freezes_batchnorm: bool
    batch_size: int | None
    every_n_steps: int
    seed: int
    stop_on: tuple[StopCondition, ...]
    progress_bar: bool
    exact: bool
    track_actual: bool
    preflight: bool
    verify: VerifySteps | None
    objective: Objective | None = None
    retain_objective: Objective | None = None
    mask: Mapping[str, Tensor] | None = None
    schedule: Schedule | None = None

    @property
    def objectives(self) -> dict[str, Objective]:
        """The objectives that are not the module's own loss."""
        pair = {"forget": self.objective, "retain": self.retain_objective}
        return {name: objective for name, objective in pair.items() if objective is not None}


class Fit:
    """Wraps the optimizer, pairs each retain batch with one of each other group, and counts.

    Args:
        trainer: The trainer, with its strategy and optimizers set up.
        settings: What the user asked for.
        state: The state of an earlier run that this one continues, or an empty dict.
    """

    def __init__(self, trainer: Trainer, settings: FitSettings, state: dict[str, Any]) -> None:
        self._trainer, self._settings = trainer, settings
        base = trainer.optimizers[0]
        check_sketch(trainer, settings.sketch, verifies=settings.verify is not None)
        check_own_optimizer(base, mask=settings.mask, schedule=settings.schedule)
        options = {
            "exact": settings.exact,
            "track_actual": settings.track_actual,
            "reuse_groups": settings.groups_per_step is not None,
            "sketch": settings.sketch,
        }
        self.optimizer = wrap_optimizer(trainer.lightning_module, base, settings.rule, settings.mask, **options)
        check_target(settings.objective, self.optimizer.rule)
        self._has_wrapped = self.optimizer is not base
        self.groups = Groups(trainer, self.optimizer, settings)
        if self._has_wrapped:
            # Schedulers hold the base optimizer, whose groups the wrapper shares.
            trainer.strategy.optimizers = [self.optimizer]
        is_deciding = settings.stop_on or self.optimizer.rule.target_quotas
        self.optimizer.approve = self._approve if is_deciding else None
        self._patch = _compat.StepPatch(trainer.strategy, self._around_step)
        self._verifier: Verifier | None = None
        self._journal = Journal(trainer, self.optimizer.rule.groups, settings.progress_bar)
        self._prices = Prices()
        schedule = settings.schedule
        self._turns = None if schedule is None else Turns(trainer, self.optimizer, schedule)
        self._watchdog: Watchdog | None = None
        self._frozen: dict[_BatchNorm, bool] = {}
        self._best: dict[str, str] = {}
        self._preflight: FitPreflight | None = None
        self.preflight_report: PreflightReport | None = None
        self.load_state_dict(state)
        # The accumulation window: micro-batches so far, whether the last one gave a loss, whether the window will be
        # combined, and the retain losses, 0-d each.
        self._window, self._gave_loss, self._combines = 0, False, True
        self._retain_losses: list[Tensor] = []
        self._reported = self.optimizer.last_step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an earlier run; some strategies load checkpoints after the fit has started."""
        self._state = state
        if "optimizer" in state:
            self.optimizer.load_hamu_state_dict(state["optimizer"])
        self.groups.load_state_dict(state.get("groups", {}))
        self._before = self._counts()
        self._journal.load_state_dict(state.get("journal", {}))
        self._prices.load_state_dict(state.get("prices", {}))
        if self._turns is not None:
            self._turns.load_state_dict(state.get("turns", {}))
        for name, objective in self._settings.objectives.items():
            objective.load_state_dict(state.get("objectives", {}).get(name, {}))
        # Other settings may go on where these had to stop.
        stopped = state["stop"] if state.get("stopped_under") == self._stopping_settings() else {}
        self._stopper = Stopper(self._trainer, self.optimizer, self._settings.stop_on, stopped)

    def start(self) -> None:
        """Find the batches of all groups; the training loader is there now."""
        settings = self._settings
        self.groups.start()
        if settings.preflight:
            self._preflight = FitPreflight(self._trainer, self.optimizer, self.groups.loader, settings.seed)
        if settings.verify is not None:
            self._verifier = self.optimizer.referee = Verifier(self._trainer, settings.verify)
            if "verifier" in self._state:
                self._verifier.load_state_dict(self._state["verifier"])
        self._watchdog = Watchdog([p for group in self.optimizer.param_groups for p in group["params"]])

    def add_request(self, settings: FitSettings, name: str) -> None:
        """Take one more group into the problem, between two epochs; `settings` know of it already."""
        assert settings.rule is not None
        self._settings, self.optimizer.rule = settings, settings.rule
        self.groups.add(settings, name)
        self._journal.add_group(name)
        if settings.rule.target_quotas:
            self.optimizer.approve = self._approve

    def _run_preflight(
        self, preflight: FitPreflight, step: Callable[..., Any], retain_step: Callable[..., Any]
    ) -> None:
        """Predict what the run will do, and say so; leaves no trace."""
        self._preflight = None
        self.preflight_report = preflight.run(step, retain_step)
        rank_zero_info(f"\n{self.preflight_report}")  # not behind a progress bar

    def start_epoch(self) -> None:
        """Open a new window, as Lightning does, and compare the whole module again at the next forget pass."""
        self._window = 0
        if self.optimizer.has_forget_gradient:  # of a window that was cut short
            self.optimizer.release_forget()
            self.groups.take_all_next()
        self.groups.guard.look_again()

    def prepare_forget_gradient(self) -> None:
        """Unscale and clip the other gradients, each on its own, before Lightning clips the retain gradient."""
        if not (self._combines and self._retain_losses):
            return
        scaler = _compat.grad_scaler(self._trainer)
        if scaler is not None:
            if not self._gave_loss:  # Lightning calls neither the scaler nor `step` then
                return
            self.optimizer.unscale_forget_(scaler)
        if _compat.clips_gradients(self._trainer):
            for group in self.groups.present:
                group.run.clip()

    def end_batch(self) -> None:
        """After a batch: log, stop, and open a new window where one has ended."""
        for group in self.groups.present:
            self._journal.log_module(group.name, group.run.logged)
        if _compat.is_accumulating(self._trainer):
            return
        self.optimizer.drop_step()  # does nothing unless the loss scaler has left `step` out
        if self._watchdog is not None and not self._watchdog.check(self.optimizer.calls):
            self._watchdog = None
        report = self.optimizer.last_step
        more = self._stopper.numbers() | self.groups.levels()
        if self._verifier is not None:
            more |= self._verifier.numbers()
        if report is not None and report is not self._reported and isinstance(report.coefficients, GroupCoefficients):
            self._prices.add(report.coefficients)
        turn = {} if self._turns is None else self._turns.numbers()
        self._journal.log_step(None if report is self._reported else report, more, turn)
        self._reported = report
        if self._turns is not None and self._window:
            self._turns.close_window()
        if self._combines:
            self._close_window()
        self._stopper.end_fit()
        self._window = 0
        self.groups.guard.end_window()
        self._best = best_checkpoints(self._trainer)

    def _close_window(self) -> None:
        self.groups.close_window()
        if self._verifier is not None:
            self._verifier.close_window()
            if self._verifier.is_lost:
                self._stopper.stop(StopReason.PROMISES_BROKEN, f"{self._verifier.describe()}.")

    def unfreeze(self) -> None:
        """Put the BatchNorm layers back into the modes in which they were found."""
        for layer, mode in self._frozen.items():
            layer.training = mode
        self._frozen.clear()

    def check_it_happened(self) -> None:
        """Raise unless there was unlearning: forgetting must never silently not happen."""
        done = {name: count - self._before[name] for name, count in self._counts().items()}
        if self._turns is not None and self._before["combined_steps"]:
            return  # this fit went on with what was left: the repair
        is_excused = self._stopper.reason is not None or (_compat.is_trial(self._trainer) and done["left_out_steps"])
        missing = "forget passes" if not done["forget_passes"] else "combined steps"
        if done["forget_passes"] and (done["combined_steps"] or is_excused):
            return
        raise HAMUStateError(
            f"Expected unlearning to happen in this fit, but it ended with 0 {missing} ({done['left_out_steps']} were "
            "left out: numbers that are not finite, learning rate 0, no retain loss, an overflow of the loss scale). "
            "Check that the module's `training_step` runs through the Trainer, `every_n_steps` against the number of "
            "steps, the learning rates and the precision."
        )

    def warn_about_stale_best(self) -> None:
        """Warn, after the fit, about a best checkpoint from before the last step."""
        if self._turns is not None or not self.optimizer.rule.is_plain:
            warn_about_stale_best(self._best, best_checkpoints(self._trainer))

    def warn_if_short(self) -> None:
        """Say so if there is a target and the fit has ended before it."""
        short = self.groups.describe_short()
        if short and self._stopper.reason is None:
            rank_zero_warn(
                f"The fit has ended before the target: {short}. "
                "Give it more steps, or a larger radius: HAMUQ(TargetQuota(...), radius=RelativeRadius(3e-3))."
            )

    def draw_costs(self) -> None:
        """Show in TensorBoard which request makes which protection expensive."""
        if self._trainer.is_global_zero:
            self._prices.draw(self._trainer, *self.groups.names_by_role())

    def mean_costs(self) -> Tensor:
        """For each protected group and each request, the mean of `GroupCoefficients.costs`."""
        return self._prices.costs(*self.groups.names_by_role())

    def totals(self) -> dict[str, Tensor]:
        """What was done, in numbers for `trainer.callback_metrics`."""
        numbers = {**self._counts(), "has_stopped": self._stopper.reason is not None}
        return {f"hamu/{name}": torch.tensor(float(number)) for name, number in numbers.items()}

    def summary(self) -> str:
        """One line on what was done."""
        counts = self._counts()
        return (
            f"HAMU: {counts['combined_steps']} combined steps ({counts['left_out_steps']} left out), "
            f"{self._journal.summary()}."
            + ("" if self._verifier is None else f" {self._verifier.describe()}.")
            + ("" if self._turns is None else f" {self._turns.describe()}.")
            + self._prices.format(self._journal.path, *self.groups.names_by_role())
        )

    def _counts(self) -> dict[str, int]:
        """What was done, this fit and the one that it continues; reads the host."""
        return {
            "forget_passes": self.groups.passes,
            "combined_steps": int(self.optimizer.applied_steps),
            "left_out_steps": int(self.optimizer.left_out_steps),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state in tensors, numbers, strings, lists and dicts."""
        objectives = {name: objective.state_dict() for name, objective in self._settings.objectives.items()}
        return {
            "groups": self.groups.state_dict(),
            **({"objectives": objectives} if objectives else {}),
            "optimizer": self.optimizer.hamu_state_dict(),
            **self._counts(),
            "stop": self._stopper.state_dict(),
            "stopped_under": self._stopping_settings(),
            "journal": self._journal.state_dict(),
            "prices": self._prices.state_dict(),
            **({} if self._turns is None else {"turns": self._turns.state_dict()}),
            **({} if self._verifier is None else {"verifier": self._verifier.state_dict()}),
        }

    def close(self) -> None:
        """Take back every change to the trainer, the module and its optimizer."""
        self.unfreeze()
        self._patch.remove()
        self.optimizer.release_forget()
        self.optimizer.approve = self.optimizer.referee = self.optimizer.recompute = None
        if self._has_wrapped:
            self._trainer.strategy.optimizers = [self.optimizer.base]

    def _around_step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the passes of the other groups, then the retain pass as it is."""
        trainer, settings = self._trainer, self._settings
        batches: Mapping[str, Any] = {}
        if self.groups.are_in_batch:
            names = self.optimizer.rule.groups
            batches = dict(zip(names, split_batch(args[0], names), strict=True))
            _compat.set_foreground_batch(trainer, batches["retain"])
            args = (batches["retain"], *args[1:])
        if _compat.skips_backward(trainer):
            self.unfreeze()
            self._combines = False
            self.optimizer.plan_step("retain_only")
            return step(*args, **kwargs)
        if settings.freezes_batchnorm:
            self._freeze()
        if self._window == 0:
            self._combines = trainer.global_step % settings.every_n_steps == 0
            if self._turns is not None:
                self._combines = self._turns.open_window()
            self._retain_losses = []
        self._window += 1
        objectives = settings.objective, settings.retain_objective
        forget_step, retain_step = (wrap_step(step, objective, trainer) for objective in objectives)
        if self._combines:
            self._run_groups(forget_step, retain_step, args, kwargs, batches)
        if self._verifier is not None and self._combines and self._verifier.is_due:
            output = self._verifier.run_retain(retain_step, args, kwargs)
        else:
            output = retain_step(*args, **kwargs)
        self._note_retain(detached_loss(output))
        return output

    def _run_groups(
        self,
        forget_step: Callable[..., Any],
        retain_step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batches: Mapping[str, Any],
    ) -> None:
        """Measure what is to be measured before the step, then run the pass of each group."""
        if self._window == 1:
            for group in self.groups.open_window(forget_step, args, kwargs):
                self._say_done(group)
        if self._preflight is not None:
            self._run_preflight(self._preflight, forget_step, retain_step)
        protected = self._settings.protect
        steps = {name: retain_step if name in ("retain", *protected) else forget_step for name in self.groups.names}
        if self._verifier is not None and self._window == 1:
            passes = {group.name: group.run for group in self.groups.present}
            self._verifier.open_window(steps, passes)
        if self._settings.sketch is not None and self._window == 1:
            self.optimizer.recompute = self.groups.record(steps)
        for group in self.groups.present:
            loss = group.run_batch(steps[group.name], args, kwargs, batches.get(group.name))
            self._journal.add_loss(group.name, loss)

    def _say_done(self, group: Group) -> None:
        """A group has met its target, and others have not."""
        assert group.approach is not None
        self._journal.end_group(group.name)
        rank_zero_info(
            f"HAMU: {group.name!r} leaves the problem at step {self._trainer.global_step}: {group.approach.describe()}."
        )

    def _note_retain(self, loss: Tensor | None) -> None:
        """Count the retain loss, and tell the optimizer what its next step is to do."""
        self._gave_loss = loss is not None
        if loss is not None:
            self._retain_losses.append(loss)
            self._journal.add_loss("retain", loss)
        full, n = self._trainer.accumulate_grad_batches, len(self._retain_losses)
        plan: Plan = "combine" if self._combines else "retain_only" if self._stopper.reason is None else "drop"
        shares = n / full, self._window / full
        self.optimizer.plan_step(plan if n else "drop", window_shares=shares, groups=self.groups.names)

    def _approve(self, report: StepReport) -> bool:
        """Whether a step is to be applied."""
        groups = self.groups
        if groups.are_there:
            self._stopper.stop(StopReason.TARGET_REACHED, f"{groups.describe()}.")
        if groups.are_lost:
            self._stopper.stop(
                StopReason.NOT_FINITE, f"{groups.describe()}. Verified steps or a smaller radius prevent it."
            )
        return self._stopper.approves(report, self._retain_losses, groups.forget_losses, groups.target)

    def _stopping_settings(self) -> str:
        return repr((self._settings.schedule or self.optimizer.rule, self._settings.stop_on))

    def _freeze(self) -> None:
        for layer in self._trainer.lightning_module.modules():
            if isinstance(layer, _BatchNorm):
                self._frozen.setdefault(layer, layer.training)
                layer.training = False
