"""HAMUCallback: unlearning for an unmodified LightningModule."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset
from typing_extensions import Unpack, override

from hamu_lightning.callbacks._checks import check_data, check_setup, check_strategy
from hamu_lightning.callbacks._fit import Fit
from hamu_lightning.callbacks._parts import Past
from hamu_lightning.callbacks._record import Record
from hamu_lightning.callbacks._refusal import refusing
from hamu_lightning.callbacks._settings import (
    DeprecatedOptions,
    FitSettings,
    PassOptions,
    StepOptions,
    choose_rule,
    choose_verification,
    take_deprecated,
)
from hamu_lightning.callbacks.forecast import PreflightReport
from hamu_lightning.callbacks.goals import (
    Confirm,
    RetainGuard,
    StopCondition,
    StopOn,
    Target,
    VerifySteps,
    as_conditions,
    choose_guard,
)
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.objectives import Objective
from hamu_lightning.optim import StepReport
from hamu_lightning.rules import Quota, Rule, Schedule


class HAMUCallback(Record, Callback):
    """Makes a fit unlearn: each optimizer step also raises the loss on the data to forget, as the rule says.

    The Trainer's own loader is the retain stream; the module and its optimizer stay as they are. What happens:

    - `on_fit_start` wraps the module's optimizer in a `HAMUOptimizer` (one that `configure_optimizers` returned is
      used as it is, with its rule). What cannot work is refused here.
    - At each training batch, after all start hooks, a forget batch goes through the module first: transfer, forward,
      backward, with the module's own hooks. Its gradient goes to a slot of its own. Everything else that it touches is
      put back (`ForgetPass`, `ModuleGuard`): random states, BatchNorm statistics, torchmetrics, logged values,
      attributes, other callbacks.
    - Then Lightning's own pass on the retain batch, untouched.
    - Before the step the forget gradient is unscaled (16-mixed) and clipped on its own, as the retain gradient is.
    - The step combines the two. A step with non-finite gradients is left out and counted
      (`left_out_steps`); if all of a fit's are, it ends with an error.
    - At logging steps the names `hamu/...`, `retain/loss` and `forget/loss` are logged (means since the last logging
      step); what the module logs in its forget pass appears as `forget/<its name>`.
    - Validation and test are not touched. `teardown` takes everything back: a second `fit` is a plain one without the
      callback.
    - An epoch without backward passes (StochasticWeightAveraging ends with one, for BatchNorm) is left to Lightning.
    - `Tuner.lr_find`, `Tuner.scale_batch_size` and their callbacks put all other callbacks aside: they tune plain
      training on the retain data.
    - LearningRateMonitor lists the optimizer as in a plain fit, once.
    - Where processes are spawned (`strategy="ddp_spawn"`, "ddp_notebook"), this object works in copies. Of what they
      count, `trainer.callback_metrics` brings back `hamu/forget_passes`, `hamu/combined_steps` and `hamu/has_stopped`.
    - Checkpoints hold the position and the random state of the forget stream and the counters, in the callback's
      state; the module's and the optimizer's states are those of a plain run.

    Args:
        forget: The data to forget: a DataLoader or another iterable of batches, a Dataset (loaded like the training
            data, shuffled), or None when the module or datamodule has `forget_dataloader()` or the training loader
            yields `{"retain": ..., "forget": ...}`. The shorter stream cycles; each pass shuffles anew.
            With a rule for several groups a mapping from the names of the requests to their data.
        rule: How the gradients are combined, such as `HAMUQ(quota=1e-3)`, or
            `FeasibleDirection(quota={"request-17": 1e-3, "request-18": 5e-4}, floor={"minority": 0.0})`.
        protect: The data of the groups that the rule protects, by name.
        target: Instead of a rule: where forgetting should end, and the fit with it. `Unseen(holdout)` (what the model
            says about samples that it never saw: for samples), `Unseen()` (the same for whole classes),
            `SecondChoice()` (for wrong labels); for the module's own loss a number, `Holdout(loader)`, `Chance()`, or a
            function of the module. Means
            `HAMUQ(TargetQuota(target), radius=RelativeRadius(2e-3), blocks="global")`, with `AdapterRadius(5e-2)` where
            low-rank adapters are trained (LoRA); `Approach` judges when it is reached. A mapping from the names of the
            requests to their targets means
            `FeasibleDirection`, with a floor of 0 for what is protected.
        seed: Seed of the forget stream's own random state.
        stop_on: When to stop before a step is applied: "collateral_damage" (no step can meet the quota without harm,
            docs/method.md#certificates), "infeasible" (the trust region does not allow the quota), "not_finite", or
            conditions with settings: `CollateralDamage`, `Infeasible`, `NotFinite`, `RetainAbove(loss)`,
            `ForgetAbove(loss)`. The model reached is kept; above a ceiling, the one from before. `hamu/score` is for
            `ModelCheckpoint`.
        progress_bar: Whether the progress bar shows `forget/loss`, `hamu/margin` and `hamu/forget_level` beside
            `forget`, which is always there: the loss of training batches, or with a target level and end, `0.04/0.06`.
        preflight: Before the first forget pass, predict from up to 16 batch pairs what can be had and what it costs,
            print it, and keep it in `preflight_report`; see `hamu_lightning.preflight`. The run stays the same bit for
            bit, as long as the loaders and their datasets can be iterated a second time without a change to themselves.
            One process only.
        objective: What is raised on the forget data instead of the module's own loss, such as `NPO(beta=0.1)`. The
            module's `training_step` then does not run on this stream, and logs nothing there, unless the objective asks
            for it. `forget/loss` and quotas are in its units; targets and ceilings are not, see `ByObjective`.
        retain_objective: What is lowered on the retain data instead, such as
            `WeightedSum((1.0, ReferenceKL()), (0.1, CrossEntropy()))`; likewise.
        schedule: Instead of a rule: rules that take turns, such as `Alternate(max_epochs=3, max_steps=10)`, the
            alternation of SCRUB. A step of a plain rule runs no forget pass and is no combined step; in any other one
            both passes run, also where the rule uses one gradient alone. `turns` and `hamu/turn` say which rule made
            the steps. Epochs count from where unlearning began.
        verify: `VerifySteps()`, or True, measures both losses again after each step, and takes back a step that breaks
            its promise. Default: with `target`, and not else.
        confirm: A check before the target counts as reached, such as `hamu_lightning.text.SpansGone(part)`: a function
            of the module that says in words what speaks against it, or nothing. While it fails the fit goes on, to a
            higher loss; no step is asked for more than half of the capacity then. For several requests a mapping.
        guard: `RetainGuard()`, or True, measures the retain data as a whole every so many steps, and goes back where
            they have lost too much. Default: with `target`, and not else.
        passes: Batch size, BatchNorm, and how often forget passes run.
        steps: How the optimizer takes the steps: exactly, within a mask, from projections.
        **deprecated: The fields of `passes` and `steps` by their own names, as before there were these two.

    Raises:
        HAMUValueError: If an argument is out of its range.
        HAMUMisconfigurationError: If the rule and the data have different groups.

    Example:
        >>> from hamu_lightning.rules import HAMUQ
        >>> callback = HAMUCallback(forget=[...], rule=HAMUQ(quota=1e-3), stop_on=("infeasible",))
        >>> # Trainer(callbacks=[callback]).fit(module, retain_loader)
    """

    def __init__(
        self,
        forget: Iterable[Any] | Dataset | Mapping[str, Any] | None = None,  # type: ignore[type-arg]  # LightningCLI makes no Dataset[Any]
        rule: Rule | None = None,
        *,
        protect: Mapping[str, Any] | None = None,
        target: Target | float | Callable[[Any], Any] | None = None,
        seed: int = 0,
        stop_on: Iterable[StopOn | StopCondition] = (),
        progress_bar: bool = False,
        preflight: bool = False,
        verify: VerifySteps | bool | None = None,
        guard: RetainGuard | bool | None = None,
        confirm: Confirm | Mapping[str, Confirm] | None = None,
        objective: Objective | None = None,
        retain_objective: Objective | None = None,
        schedule: Schedule | None = None,
        passes: PassOptions = PassOptions(),  # noqa: B008  # frozen
        steps: StepOptions = StepOptions(),  # noqa: B008
        **deprecated: Unpack[DeprecatedOptions],
    ) -> None:
        super().__init__()
        passes, steps = take_deprecated(passes, steps, deprecated)
        self.settings = FitSettings(
            forget=forget,
            protect={} if protect is None else protect,
            rule=choose_rule(
                rule, target, schedule, passes.every_n_steps, protect if isinstance(protect, Mapping) else (), confirm
            ),
            schedule=schedule,
            objective=objective,
            retain_objective=retain_objective,
            stop_on=as_conditions(stop_on),
            verify=choose_verification(verify, has_target=target is not None),
            guard=choose_guard(guard, has_target=target is not None),
            passes=passes,
            steps=steps,
            preflight=preflight,
            progress_bar=progress_bar,
            seed=seed,
            has_target=target is not None,
            confirm=confirm,
        )
        self._requests: list[str] = []
        self._preflight_report: PreflightReport | None = None
        self._fit: Fit | None = None
        self._state: dict[str, Any] = {}
        # Whether the state was loaded since the last fit, and the module of that fit.
        self._is_loaded = False
        self._module: Callable[[], LightningModule | None] = _no_module
        self._last_step: StepReport | None = None

    @override
    def __repr__(self) -> str:
        return f"HAMUCallback({self.settings.schedule or self.settings.rule})"

    def add_request(self, name: str, forget: Any, quota: float | Quota | None = None, *, target: Any = None) -> None:
        """Take one more request to forget into the problem: at once, or in a running fit from the next epoch on.

        A run that is resumed needs the same call again before `fit`: checkpoints hold no data.

        Args:
            name: The name of the request.
            forget: Its samples, as for the constructor.
            quota: Loss units per step, or a quota such as `RelativeQuota`.
            target: Instead of a quota: where its loss should end, as for the constructor.

        Raises:
            HAMUValueError: If the name is known already, or there is neither a quota nor a target.
            HAMUMisconfigurationError: If the callback has no rule for several groups.
        """
        self.settings = self.settings.with_request(name, forget, quota, target)
        if self._fit is not None:
            self._requests.append(name)

    @property
    @override
    def state_key(self) -> str:
        return "HAMUCallback"

    @property
    def last_step(self) -> StepReport | None:
        """What the last combined step did."""
        return self._fit.parts.optimizer.last_step if self._fit else self._last_step

    @property
    def preflight_report(self) -> PreflightReport | None:
        """What `preflight=True` found; None before the first batch."""
        return (self._fit and self._fit.flow.preflight_report) or self._preflight_report

    def find_data(self) -> tuple[dict[str, Any], Any]:
        """Return, in a fit that has started, the loaders of the data to forget by name, and that of held-out data."""
        return self._running.parts.groups.find_data()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            with refusing(trainer):
                check_strategy(trainer.strategy)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with refusing(trainer):
            check_setup(trainer, pl_module, self)
            check_data(self.settings)
            self.settings = self.settings.for_module(pl_module)
            past = Past(self._state, self._is_loaded, is_same_module=self._module() is pl_module)
            self._fit = Fit(trainer, self, self.settings, past)
            self._module = weakref.ref(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with refusing(trainer):
            self._running.start()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with refusing(trainer):
            while self._requests:
                self._running.add_request(self.settings, self._requests.pop(0))
        self._running.flow.start_epoch()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._running.flow.prepare_forget_gradient()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._running.end_batch()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fit, account = self._running, self._running.account
        fit.conclude()
        # Where processes were spawned, nothing but this comes back to the first one.
        trainer.callback_metrics.update(account.totals())
        account.log_evidence()
        self._forgotten_samples = fit.parts.groups.tables()
        self._summary, self._costs = account.summary(), account.mean_costs()
        fit.parts.release()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running.flow.publish()
        self._running.account.draw_costs()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # `on_train_end` does not run where there was no batch.
        if self._fit is None:
            return
        self._summary = self._fit.account.check_it_began() or self._summary
        self._fit.account.tell(self._summary or "")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish()
        # The program that called `fit` may go on as if nothing had happened.
        rank_zero_info(f"HAMU: {type(exception).__name__} ended the fit after {self.combined_steps} combined steps.")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        fit = self._fit
        self._finish()
        if fit is not None:
            fit.warn_about_stale_best()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._fit.parts.state_dict() if self._fit else dict(self._state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state, self._is_loaded = dict(state_dict), True
        if self._fit is not None:
            self._fit.parts.load_state_dict(self._state)

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds the settings and the state, but nothing of a running fit (iterators, patches).

        Copies in this process hold the data as well; pickles hold a description of it, see `FitSettings`.
        """
        return {
            **self.__dict__,
            "_fit": None,
            "_module": _no_module,
            "_state": self.state_dict(),
            "_last_step": None,
            "_preflight_report": self.preflight_report,
        }

    @property
    def _running(self) -> Fit:
        if self._fit is None:
            raise HAMUStateError(
                "Expected to be in a fit, but `on_fit_start` was not called. Add the callback to a Trainer."
            )
        return self._fit

    def _finish(self) -> None:
        """Take back everything that was changed; what was counted stays readable."""
        if self._fit is not None:
            fit, parts = self._fit, self._fit.parts
            fit.flow.settle(judges=False)  # after an error nobody can
            self._state, self._last_step = parts.state_dict(), parts.optimizer.last_step
            self._preflight_report = fit.flow.preflight_report or self._preflight_report
            self._fit, self._is_loaded = None, False
            fit.close()


def _no_module() -> None:
    """Stands for a reference to a module that is gone."""
