"""What a fit with unlearning consists of, made from the settings; and what of it a checkpoint holds."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks._checks import (
    check_own_optimizer,
    check_sketch,
    check_target,
    choose_exact,
    wrap_optimizer,
)
from hamu_lightning.callbacks._consistency import check_brought
from hamu_lightning.callbacks._groups import Groups
from hamu_lightning.callbacks._guarding import Guarding
from hamu_lightning.callbacks._identity import is_same_request, is_same_run
from hamu_lightning.callbacks._journal import Journal
from hamu_lightning.callbacks._prices import Prices
from hamu_lightning.callbacks._settings import FitSettings
from hamu_lightning.callbacks.goals import AnswerTarget, RetainWatch, Stopper, StopReason, Turns, Verifier
from hamu_lightning.errors import HAMUError
from hamu_lightning.objectives import ModuleLoss

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from hamu_lightning.objectives import Objective


@dataclass(frozen=True)
class Past:
    """What a callback knows of earlier fits.

    Args:
        state: The state at the end, or of a checkpoint.
        is_loaded: Whether it is of a checkpoint, with the weights and all: then the run goes on.
        is_same_module: Whether it is of a fit of the same module object.
    """

    state: dict[str, Any] = field(default_factory=dict)
    is_loaded: bool = False
    is_same_module: bool = False

    def choose(self) -> dict[str, Any]:
        """What of the state holds in a fit with the same data. Conclusions do not: they are measured again."""
        if self.is_loaded:
            stop = self.state.get("stop", {})
            if stop.get("reason") is None:
                return self.state
            began = {n: x for n, x in self.state.get("guard", {}).items() if n in RetainWatch.beginning}
            return {**self.state, "stop": {}, "verifier": {}, "guard": began}
        # Between two fits of one callback anything may have happened to the weights: what was done and read counts on.
        kept = ("groups", "turns", "optimizer", *(["objectives"] if self.is_same_module else []))
        state = {name: self.state[name] for name in kept if name in self.state}
        return {**state, "optimizer": {**state["optimizer"], "aims": {}}} if "optimizer" in state else state


class Parts:
    """The parts of a fit.

    Args:
        trainer: The trainer, with its strategy and optimizers set up.
        settings: What the user asked for.
        past: Earlier fits, which this one may continue.

    Attributes:
        optimizer: The module's own, wrapped; or the HAMUOptimizer that the module made.
        has_wrapped: Whether it was wrapped here.
        groups: What is forgotten and what is protected.
        journal: Logs.
        prices: What requests and protections cost.
        turns: Whose turn it is, with a schedule.
        stopper: Ends the fit.
        verifier: Judges steps, once the fit has started.
        guarding: Watches over the retain data, once the fit has started.
        before: What had been done (`counts`) before this fit.
        is_resumed: Whether the fit goes on with the run of a checkpoint.
        is_started: Whether there was a training batch to come.
    """

    def __init__(self, trainer: Trainer, settings: FitSettings, past: Past) -> None:
        self.trainer, self.settings = trainer, settings
        base, steps, reuses = trainer.optimizers[0], settings.steps, settings.passes.groups_per_step is not None
        check_sketch(trainer, steps.sketch, verifies=settings.verify is not None)
        check_own_optimizer(base, mask=steps.mask, schedule=settings.schedule)
        options = {name: getattr(steps, name) for name in ("mask", "track_actual", "sketch")}
        options["exact"] = choose_exact(base, settings)
        self.optimizer = wrap_optimizer(trainer.lightning_module, base, settings.rule, reuse_groups=reuses, **options)
        self.has_wrapped = self.optimizer is not base
        check_target(settings.objective, self.optimizer.rule)
        check_brought(settings.objective, self.optimizer.rule)
        self.groups = Groups(trainer, self.optimizer, settings)
        self.journal = Journal(trainer, self._name_values(), settings.progress_bar)
        self.prices = Prices()
        schedule = settings.schedule
        self.turns = None if schedule is None else Turns(trainer, self.optimizer, schedule)
        self.verifier: Verifier | None = None
        self.guarding: Guarding | None = None
        self.stopper = Stopper(trainer, self.optimizer, settings.stop_on, {})
        self.before: dict[str, int] = {}
        self.is_resumed = self.is_started = False
        self._past = past
        self._identity: dict[str, Any] = {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an earlier run; some strategies load checkpoints after `on_fit_start`."""
        self._past = Past(state, is_loaded=True)
        if self.is_started:
            self._load(state := self._past.choose())
            self._start_guarding(state)

    def _load(self, state: dict[str, Any]) -> None:
        if "optimizer" in state:
            self.optimizer.load_hamu_state_dict(state["optimizer"])
        self.groups.load_state_dict(state.get("groups", {}))
        self.before = self.counts()
        self.journal.load_state_dict(state.get("journal", {}))
        self.prices.load_state_dict(state.get("prices", {}))
        if self.turns is not None:
            self.turns.load_state_dict(state.get("turns", {}))
        for name, objective in self.objectives.items():
            known = state.get("objectives", {})
            objective.load_state_dict(known.get(name, {}))
            objective.expect_start(not self.is_resumed and name not in known)
        # Other settings may go on where these had to stop.
        stopped = state.get("stop", {}) if state.get("stopped_under") == self._stopping_settings() else {}
        self.stopper = Stopper(self.trainer, self.optimizer, self.settings.stop_on, stopped)
        if self.settings.verify is not None:
            self.verifier = self.optimizer.referee = Verifier(self.trainer, self.optimizer, self.settings.verify)
            if state.get("verifier"):
                self.verifier.load_state_dict(state["verifier"])

    def start(self) -> None:
        """Find the batches of all groups, and go on where their run left off; the training loader is there now."""
        self.groups.find_loaders()
        state = self._recognise()
        self.is_resumed = self._past.is_loaded and bool(state)
        self._load(state)
        self.is_started = True
        self.groups.start()
        self._start_guarding(state)

    def _start_guarding(self, state: dict[str, Any]) -> None:
        parts = self.trainer, self.optimizer, self.settings, self.groups, self.stopper
        self.guarding = Guarding(*parts, state.get("guard", {}))

    def _recognise(self) -> dict[str, Any]:
        """The state to go on with: none where it belongs to other data to forget."""
        saved = self._past.state.get("identity")
        self._identity = self.groups.identify(saved and saved["salt"])
        if saved is None or is_same_run(saved, self._identity):
            return self._past.choose()
        self._identity = self.groups.identify()
        source = "the checkpoint" if self._past.is_loaded else "an earlier fit of this callback"
        rank_zero_info(
            f"HAMU: what {source} says of unlearning is about other data to forget: counts, forget losses, prices and "
            "the trust region start afresh."
        )
        return {}

    def has_been_served(self) -> bool:
        """Whether the checkpoint says that this very request has had its steps, and has reached its targets.

        For a fit without a batch; the same data, rule and conditions.
        """
        state = self._past.state
        saved, stop = state.get("identity"), state.get("stop", {})
        is_done = not self.optimizer.rule.target_quotas or stop.get("reason") == StopReason.TARGET_REACHED.value
        has_steps = self._past.is_loaded and state.get("combined_steps", 0) > 0
        if saved is None or not (has_steps and is_done and state.get("stopped_under") == self._stopping_settings()):
            return False
        with suppress(HAMUError):  # the error to come says more
            self.groups.find_loaders()
            return is_same_request(saved, self.groups.identify(saved["salt"]))
        return False

    def add_request(self, settings: FitSettings, name: str) -> None:
        """Take one more group into the problem, between two epochs; `settings` know of it already."""
        assert settings.rule is not None
        self.settings, self.optimizer.rule = settings, settings.rule
        self.groups.add(settings, name)
        self._identity = self.groups.identify(self._identity["salt"])
        self.journal.add_group(name, self._name_values()[name])

    def _name_values(self) -> dict[str, str]:
        """For each group what a batch of it has: a loss, or the value of an objective in its place."""
        given = {"retain": self.settings.retain_objective, **self.groups.given}
        is_loss = {name: isinstance(objective, ModuleLoss | None) for name, objective in given.items()}
        return {name: "loss" if is_loss[name] else "objective" for name in self.optimizer.rule.groups}

    @property
    def raised(self) -> str:
        """What is raised on the first group besides retain, in words."""
        name = self.optimizer.rule.groups[1]
        quota = self.optimizer.rule.target_quotas.get(name)
        target = quota and quota.target
        return target.what if isinstance(target, AnswerTarget) else f"forget {self._name_values()[name]}"

    def release(self) -> None:
        """Let go of what only a running fit needs."""
        for objective in self.objectives.values():
            objective.load_state_dict(objective.final_state_dict())

    @property
    def objectives(self) -> dict[str, Objective]:
        """The objectives that are not the module's own loss."""
        retain = self.settings.retain_objective
        return {**self.groups.objectives, **({} if retain is None else {"retain": retain})}

    @property
    def is_deciding(self) -> bool:
        """Whether something may end the fit before a step."""
        return bool(self.settings.stop_on or self.settings.guard or self.optimizer.rule.target_quotas)

    def counts(self) -> dict[str, int]:
        """What was done, by this fit and the one that it continues; reads the host."""
        return {
            "forget_passes": self.groups.passes,
            "combined_steps": int(self.optimizer.applied_steps),
            "left_out_steps": int(self.optimizer.left_out_steps),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state in tensors, numbers, strings, lists and dicts."""
        if not self.is_started:
            return dict(self._past.state)
        has_ended = _compat.has_ended(self.trainer)
        objectives = {
            name: objective.final_state_dict() if has_ended else objective.state_dict()
            for name, objective in self.objectives.items()
        }
        return {
            "identity": self._identity,
            "groups": self.groups.state_dict(),
            **({"objectives": objectives} if objectives else {}),
            "optimizer": self.optimizer.hamu_state_dict(),
            **self.counts(),
            "stop": self.stopper.state_dict(),
            "stopped_under": self._stopping_settings(),
            "journal": self.journal.state_dict(),
            "prices": self.prices.state_dict(),
            **({} if self.turns is None else {"turns": self.turns.state_dict()}),
            **({} if self.guarding is None else {"guard": self.guarding.state_dict()}),
            **({} if self.verifier is None else {"verifier": self.verifier.state_dict()}),
        }

    def _stopping_settings(self) -> str:
        return repr((self.settings.schedule or self.optimizer.rule, self.settings.stop_on))
