"""One fit with unlearning: what HAMUCallback holds between `on_fit_start` and `teardown`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks._account import Account
from hamu_lightning.callbacks._checks import best_checkpoints, warn_about_stale_best
from hamu_lightning.callbacks._flow import Flow
from hamu_lightning.callbacks._parts import Parts
from hamu_lightning.callbacks._settings import FitSettings

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Fit:
    """Puts the parts of a fit into the trainer, and takes them out again.

    Args:
        trainer: The trainer, with its strategy and optimizers set up.
        settings: What the user asked for.
        state: The state of an earlier run that this one continues, or an empty dict.

    Attributes:
        parts: What the fit consists of, and its state.
        flow: What happens at each batch.
        account: What is said at the end.
    """

    def __init__(self, trainer: Trainer, settings: FitSettings, state: dict[str, Any]) -> None:
        self._trainer = trainer
        self.parts = parts = Parts(trainer, settings, state)
        self.flow, self.account = Flow(parts), Account(parts)
        self._best: dict[str, str] = {}
        if parts.has_wrapped:
            # Schedulers hold the base optimizer, whose groups the wrapper shares.
            trainer.strategy.optimizers = [parts.optimizer]
        self._let_decide()
        self._patch = _compat.StepPatch(trainer.strategy, self.flow.around_step)

    def _let_decide(self) -> None:
        self.parts.optimizer.approve = self.flow.approve if self.parts.is_deciding else None

    def start(self) -> None:
        """Find the batches of all groups; the training loader is there now."""
        self.parts.start()
        self.flow.start()

    def add_request(self, settings: FitSettings, name: str) -> None:
        """Take one more group into the problem, between two epochs; `settings` know of it already."""
        self.parts.add_request(settings, name)
        self._let_decide()

    def end_batch(self) -> None:
        """After a batch: log, stop, and open a new window where one has ended."""
        if self.flow.end_batch():
            self._best = best_checkpoints(self._trainer)

    def warn_about_stale_best(self) -> None:
        """Warn, after the fit, about a best checkpoint from before the last step."""
        if self.parts.turns is not None or not self.parts.optimizer.rule.is_plain:
            warn_about_stale_best(self._best, best_checkpoints(self._trainer))

    def close(self) -> None:
        """Take back every change to the trainer, the module and its optimizer."""
        optimizer = self.parts.optimizer
        self.flow.batchnorm.thaw()
        self._patch.remove()
        self.parts.groups.close()
        optimizer.release_forget()
        optimizer.approve = optimizer.referee = optimizer.recompute = None
        if self.parts.has_wrapped:
            self._trainer.strategy.optimizers = [optimizer.base]
