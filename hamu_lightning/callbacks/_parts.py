"""What a fit with unlearning consists of, made from the settings; and what of it a checkpoint holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks._checks import check_own_optimizer, check_sketch, check_target, wrap_optimizer
from hamu_lightning.callbacks._groups import Groups
from hamu_lightning.callbacks._journal import Journal
from hamu_lightning.callbacks._prices import Prices
from hamu_lightning.callbacks._settings import FitSettings
from hamu_lightning.callbacks.goals import Stopper, Turns, Verifier

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Parts:
    """The parts of a fit.

    Args:
        trainer: The trainer, with its strategy and optimizers set up.
        settings: What the user asked for.
        state: The state of an earlier run that this one continues, or an empty dict.

    Attributes:
        optimizer: The module's own, wrapped; or the HAMUOptimizer that the module made.
        has_wrapped: Whether it was wrapped here.
        groups: What is forgotten and what is protected.
        journal: Logs.
        prices: What requests and protections cost.
        turns: Whose turn it is, with a schedule.
        stopper: Ends the fit.
        verifier: Judges steps, once the fit has started.
        before: What had been done (`counts`) by the run that this one continues.
    """

    def __init__(self, trainer: Trainer, settings: FitSettings, state: dict[str, Any]) -> None:
        self.trainer, self.settings = trainer, settings
        base, steps, reuses = trainer.optimizers[0], settings.steps, settings.passes.groups_per_step is not None
        check_sketch(trainer, steps.sketch, verifies=settings.verify is not None)
        check_own_optimizer(base, mask=steps.mask, schedule=settings.schedule)
        options = {name: getattr(steps, name) for name in ("mask", "exact", "track_actual", "sketch")}
        self.optimizer = wrap_optimizer(trainer.lightning_module, base, settings.rule, reuse_groups=reuses, **options)
        self.has_wrapped = self.optimizer is not base
        check_target(settings.objective, self.optimizer.rule)
        self.groups = Groups(trainer, self.optimizer, settings)
        self.journal = Journal(trainer, self.optimizer.rule.groups, settings.progress_bar)
        self.prices = Prices()
        schedule = settings.schedule
        self.turns = None if schedule is None else Turns(trainer, self.optimizer, schedule)
        self.verifier: Verifier | None = None
        self.load_state_dict(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an earlier run; some strategies load checkpoints after the fit has started."""
        self._state = state
        if "optimizer" in state:
            self.optimizer.load_hamu_state_dict(state["optimizer"])
        self.groups.load_state_dict(state.get("groups", {}))
        self.before = self.counts()
        self.journal.load_state_dict(state.get("journal", {}))
        self.prices.load_state_dict(state.get("prices", {}))
        if self.turns is not None:
            self.turns.load_state_dict(state.get("turns", {}))
        for name, objective in self.settings.objectives.items():
            objective.load_state_dict(state.get("objectives", {}).get(name, {}))
        # Other settings may go on where these had to stop.
        stopped = state["stop"] if state.get("stopped_under") == self._stopping_settings() else {}
        self.stopper = Stopper(self.trainer, self.optimizer, self.settings.stop_on, stopped)

    def start(self) -> None:
        """Find the batches of all groups; the training loader is there now."""
        self.groups.start()
        if self.settings.verify is not None:
            self.verifier = self.optimizer.referee = Verifier(self.trainer, self.settings.verify)
            if "verifier" in self._state:
                self.verifier.load_state_dict(self._state["verifier"])

    def add_request(self, settings: FitSettings, name: str) -> None:
        """Take one more group into the problem, between two epochs; `settings` know of it already."""
        assert settings.rule is not None
        self.settings, self.optimizer.rule = settings, settings.rule
        self.groups.add(settings, name)
        self.journal.add_group(name)

    def release(self) -> None:
        """Let go of what only a running fit needs."""
        for objective in self.settings.objectives.values():
            objective.load_state_dict(objective.final_state_dict())

    @property
    def is_deciding(self) -> bool:
        """Whether something may end the fit before a step."""
        return bool(self.settings.stop_on or self.optimizer.rule.target_quotas)

    def counts(self) -> dict[str, int]:
        """What was done, by this fit and the one that it continues; reads the host."""
        return {
            "forget_passes": self.groups.passes,
            "combined_steps": int(self.optimizer.applied_steps),
            "left_out_steps": int(self.optimizer.left_out_steps),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state in tensors, numbers, strings, lists and dicts."""
        has_ended = _compat.has_ended(self.trainer)
        objectives = {
            name: objective.final_state_dict() if has_ended else objective.state_dict()
            for name, objective in self.settings.objectives.items()
        }
        return {
            "groups": self.groups.state_dict(),
            **({"objectives": objectives} if objectives else {}),
            "optimizer": self.optimizer.hamu_state_dict(),
            **self.counts(),
            "stop": self.stopper.state_dict(),
            "stopped_under": self._stopping_settings(),
            "journal": self.journal.state_dict(),
            "prices": self.prices.state_dict(),
            **({} if self.turns is None else {"turns": self.turns.state_dict()}),
            **({} if self.verifier is None else {"verifier": self.verifier.state_dict()}),
        }

    def _stopping_settings(self) -> str:
        return repr((self.settings.schedule or self.optimizer.rule, self.settings.stop_on))
