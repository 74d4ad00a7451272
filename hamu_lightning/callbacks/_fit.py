"""One fit with unlearning: what HAMUCallback holds between `on_fit_start` and `teardown`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks._approach import Approach
from hamu_lightning.callbacks._checks import best_checkpoints, warn_about_stale_best, wrap_optimizer
from hamu_lightning.callbacks._forget_pass import ForgetPass, detached_loss, split_pair
from hamu_lightning.callbacks._journal import Journal
from hamu_lightning.callbacks._objective import check_target, wrap_step
from hamu_lightning.callbacks._preflight import FitPreflight
from hamu_lightning.callbacks._preflight_report import PreflightReport
from hamu_lightning.callbacks._random import RandomStream
from hamu_lightning.callbacks._sources import find_forget_loader
from hamu_lightning.callbacks._stopper import Stopper
from hamu_lightning.callbacks._stopping import StopCondition, StopReason
from hamu_lightning.callbacks._streams import ForgetStream
from hamu_lightning.callbacks._verification import Verifier, VerifySteps
from hamu_lightning.callbacks._watchdog import Watchdog
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.objectives import Objective
from hamu_lightning.optim import StepReport
from hamu_lightning.rules import Rule

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


@dataclass(frozen=True)
class FitSettings:
    """The arguments of HAMUCallback."""

    forget: Any
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

    @property
    def objectives(self) -> dict[str, Objective]:
        """The objectives that are not the module's own loss."""
        pair = {"forget": self.objective, "retain": self.retain_objective}
        return {name: objective for name, objective in pair.items() if objective is not None}


class Fit:
    """Wraps the optimizer, pairs each retain batch with a forget batch, and counts.

    Args:
        trainer: The trainer, with its strategy and optimizers set up.
        settings: What the user asked for.
        state: The state of an earlier run that this one continues, or an empty dict.
    """

    def __init__(self, trainer: Trainer, settings: FitSettings, state: dict[str, Any]) -> None:
        self._trainer, self._settings = trainer, settings
        base = trainer.optimizers[0]
        options = {"exact": settings.exact, "track_actual": settings.track_actual}
        self.optimizer = wrap_optimizer(trainer.lightning_module, base, settings.rule, **options)
        check_target(settings.objective, self.optimizer.rule)
        self._has_wrapped = self.optimizer is not base
        if self._has_wrapped:
            # Schedulers hold the base optimizer, whose groups the wrapper shares.
            trainer.strategy.optimizers = [self.optimizer]
        is_deciding = settings.stop_on or self.optimizer.rule.target_quota is not None
        self.optimizer.approve = self._approve if is_deciding else None
        self._patch = _compat.StepPatch(trainer.strategy, self._around_step)
        self._random = RandomStream(settings.seed, _compat.data_rank(trainer))
        self._stream: ForgetStream | None = None
        self._forget_pass = ForgetPass(trainer, self.optimizer, self._random)
        self._approach: Approach | None = None
        self._verifier: Verifier | None = None
        self._journal = Journal(trainer, settings.progress_bar)
        self._watchdog: Watchdog | None = None
        self._frozen: dict[_BatchNorm, bool] = {}
        self._best: dict[str, str] = {}
        self._preflight: FitPreflight | None = None
        self.preflight_report: PreflightReport | None = None
        self.load_state_dict(state)
        # The accumulation window: micro-batches so far, whether the last one gave a loss, whether the window will be
        # combined, and the losses, 0-d each.
        self._window, self._gave_loss, self._combines = 0, False, True
        self._retain_losses: list[Tensor] = []
        self._forget_losses: list[Tensor] = []
        self._reported = self.optimizer.last_step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an earlier run; some strategies load checkpoints after the fit has started."""
        self._state = state
        if "optimizer" in state:
            self.optimizer.load_hamu_state_dict(state["optimizer"])
        self._forget_passes: int = state.get("forget_passes", 0)
        self._before = self._counts()
        self._random.draw = self._forget_passes
        self._journal.load_state_dict(state.get("journal", {}))
        for name, objective in self._settings.objectives.items():
            objective.load_state_dict(state.get("objectives", {}).get(name, {}))
        # Other settings may go on where these had to stop.
        stopped = state["stop"] if state.get("stopped_under") == self._stopping_settings() else {}
        self._stopper = Stopper(self._trainer, self.optimizer, self._settings.stop_on, stopped)

    def start(self) -> None:
        """Find the forget batches; the training loader is there now."""
        settings = self._settings
        loader = find_forget_loader(self._trainer, settings.forget, settings.batch_size)
        if loader is not None:
            self._stream = ForgetStream(_compat.prepare_loader(self._trainer, loader), self._random)
            if "stream" in self._state:
                self._stream.load_state_dict(self._state["stream"])
        self._forget_pass.stream = self._stream
        if settings.preflight:
            own = None if self._stream is None else self._stream.loader
            self._preflight = FitPreflight(self._trainer, self.optimizer, own, settings.seed)
        if self.optimizer.rule.target_quota is not None:
            self._approach = Approach(self._trainer, self.optimizer, self._forget_pass, loader, settings.every_n_steps)
        if settings.verify is not None:
            self._verifier = self.optimizer.referee = Verifier(self._trainer, self._forget_pass, settings.verify)
            if "verifier" in self._state:
                self._verifier.load_state_dict(self._state["verifier"])
        self._watchdog = Watchdog([p for group in self.optimizer.param_groups for p in group["params"]])

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
        self.optimizer.release_forget()
        self._forget_pass.guard.look_again()

    def prepare_forget_gradient(self) -> None:
        """Unscale and clip the forget gradient on its own, before Lightning clips the retain gradient."""
        if not (self._combines and self._retain_losses):
            return
        scaler = _compat.grad_scaler(self._trainer)
        if scaler is not None:
            if not self._gave_loss:  # Lightning calls neither the scaler nor `step` then
                return
            self.optimizer.unscale_forget_(scaler)
        if _compat.clips_gradients(self._trainer):
            self._forget_pass.clip()

    def end_batch(self) -> None:
        """After a batch: log, stop, and open a new window where one has ended."""
        self._journal.log_module(self._forget_pass.logged)
        if _compat.is_accumulating(self._trainer):
            return
        self.optimizer.drop_step()  # does nothing unless the loss scaler has left `step` out
        if self._watchdog is not None and not self._watchdog.check(self.optimizer.calls):
            self._watchdog = None
        report = self.optimizer.last_step
        more = self._stopper.numbers() | ({} if self._approach is None else self._approach.levels())
        if self._verifier is not None:
            more |= self._verifier.numbers()
        self._journal.log_step(None if report is self._reported else report, more)
        self._reported = report
        if self._verifier is not None and self._combines:
            self._verifier.close_window()
            if self._verifier.is_lost:
                self._stopper.stop(StopReason.PROMISES_BROKEN, f"{self._verifier.describe()}.")
        self._stopper.end_fit()
        self._window = 0
        self._forget_pass.guard.end_window()
        self._best = best_checkpoints(self._trainer)

    def unfreeze(self) -> None:
        """Put the BatchNorm layers back into the modes in which they were found."""
        for layer, mode in self._frozen.items():
            layer.training = mode
        self._frozen.clear()

    def check_it_happened(self) -> None:
        """Raise unless there was unlearning: forgetting must never silently not happen."""
        done = {name: count - self._before[name] for name, count in self._counts().items()}
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
        if not self.optimizer.rule.is_plain:
            warn_about_stale_best(self._best, best_checkpoints(self._trainer))

    def warn_if_short(self) -> None:
        """Say so if there is a target and the fit has ended before it."""
        if self._approach is not None and self._stopper.reason is None and not self._approach.is_close:
            rank_zero_warn(
                f"The fit has ended before the target: {self._approach.describe()}. "
                "Give it more steps, or a larger radius: HAMUQ(TargetQuota(...), radius=RelativeRadius(3e-3))."
            )

    def totals(self) -> dict[str, Tensor]:
        """What was done, in numbers for `trainer.callback_metrics`."""
        numbers = {**self._counts(), "has_stopped": self._stopper.reason is not None}
        return {f"hamu/{name}": torch.tensor(float(number)) for name, number in numbers.items()}

    def summary(self) -> str:
        """One line on what was done."""
        counts = self._counts()
        return (
            f"HAMU: {counts['combined_steps']} combined steps ({counts['left_out_steps']} left out), "
            f"{self._journal.summary()}." + ("" if self._verifier is None else f" {self._verifier.describe()}.")
        )

    def _counts(self) -> dict[str, int]:
        """What was done, this fit and the one that it continues; reads the host."""
        return {
            "forget_passes": self._forget_passes,
            "combined_steps": int(self.optimizer.applied_steps),
            "left_out_steps": int(self.optimizer.left_out_steps),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state in tensors, numbers, strings, lists and dicts."""
        stream = {} if self._stream is None else {"stream": self._stream.state_dict()}
        objectives = {name: objective.state_dict() for name, objective in self._settings.objectives.items()}
        return {
            **stream,
            **({"objectives": objectives} if objectives else {}),
            "optimizer": self.optimizer.hamu_state_dict(),
            **self._counts(),
            "stop": self._stopper.state_dict(),
            "stopped_under": self._stopping_settings(),
            "journal": self._journal.state_dict(),
            **({} if self._verifier is None else {"verifier": self._verifier.state_dict()}),
        }

    def close(self) -> None:
        """Take back every change to the trainer, the module and its optimizer."""
        self.unfreeze()
        self._patch.remove()
        self.optimizer.release_forget()
        self.optimizer.approve = self.optimizer.referee = None
        if self._has_wrapped:
            self._trainer.strategy.optimizers = [self.optimizer.base]

    def _around_step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forget pass, then the retain pass as it is."""
        trainer, settings = self._trainer, self._settings
        forget = None
        if self._stream is None:
            retain, forget = split_pair(args[0])
            _compat.set_foreground_batch(trainer, retain)
            args = (retain, *args[1:])
        if _compat.skips_backward(trainer):
            self.unfreeze()
            self._combines = False
            self.optimizer.plan_step("retain_only")
            return step(*args, **kwargs)
        if settings.freezes_batchnorm:
            self._freeze()
        if self._window == 0:
            self._combines = trainer.global_step % settings.every_n_steps == 0
            self._retain_losses, self._forget_losses = [], []
        self._window += 1
        objectives = settings.objective, settings.retain_objective
        forget_step, retain_step = (wrap_step(step, objective, trainer) for objective in objectives)
        if self._combines:
            self._run_forget(forget_step, retain_step, args, kwargs, forget)
        if self._verifier is not None and self._combines and self._verifier.is_due:
            output = self._verifier.run_retain(retain_step, args, kwargs)
        else:
            output = retain_step(*args, **kwargs)
        self._note_retain(detached_loss(output))
        return output

    def _run_forget(
        self,
        step: Callable[..., Any],
        retain_step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        forget: Any,
    ) -> None:
        """Measure what is to be measured before the step, then run the forget pass."""
        if self._approach is not None and self._window == 1:
            self._approach.look(step, args, kwargs)
        if self._preflight is not None:
            self._run_preflight(self._preflight, step, retain_step)
        if self._verifier is not None and self._window == 1:
            self._verifier.open_window(step, retain_step)
        loss = self._forget_pass.run(step, args, kwargs, forget)
        self._forget_passes += 1
        self._forget_losses.append(loss)
        self._journal.add_forget(loss)
        if self._approach is not None:
            self._approach.observe(loss)

    def _note_retain(self, loss: Tensor | None) -> None:
        """Count the retain loss, and tell the optimizer what its next step is to do."""
        self._gave_loss = loss is not None
        if loss is not None:
            self._retain_losses.append(loss)
            self._journal.add_retain(loss)
        full, n = self._trainer.accumulate_grad_batches, len(self._retain_losses)
        plan = "combine" if self._combines else "retain_only" if self._stopper.reason is None else "drop"
        self.optimizer.plan_step(plan if n else "drop", window_shares=(n / full, self._window / full))  # type: ignore[arg-type]

    def _approve(self, report: StepReport) -> bool:
        """Whether a step is to be applied."""
        if self._approach is not None and self._approach.is_there:
            self._stopper.stop(StopReason.TARGET_REACHED, f"{self._approach.describe()}.")
        if self._approach is not None and self._approach.is_lost:
            self._stopper.stop(
                StopReason.NOT_FINITE, f"{self._approach.describe()}. Verified steps or a smaller radius prevent it."
            )
        return self._stopper.approves(report, self._retain_losses, self._forget_losses, self.optimizer.aim.target)

    def _stopping_settings(self) -> str:
        return repr((self.optimizer.rule, self._settings.stop_on))

    def _freeze(self) -> None:
        for layer in self._trainer.lightning_module.modules():
            if isinstance(layer, _BatchNorm):
                self._frozen.setdefault(layer, layer.training)
                layer.training = False
