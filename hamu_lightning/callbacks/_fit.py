"""One fit with unlearning: what HAMUCallback holds between `on_fit_start` and `teardown`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from hamu_lightning.callbacks import _compat, _compat_bar
from hamu_lightning.callbacks._account import Account
from hamu_lightning.callbacks._checks import best_checkpoints, warn_about_averages, warn_about_stale_best
from hamu_lightning.callbacks._flow import Flow
from hamu_lightning.callbacks._parts import Parts, Past
from hamu_lightning.callbacks._settings import FitSettings
from hamu_lightning.callbacks.goals import Movement

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Fit:
    """Puts the parts of a fit into the trainer, and takes them out again.

    Args:
        trainer: The trainer, with its strategy and optimizers set up.
        callback: Ours: its hooks run before those of the others.
        settings: What the user asked for.
        past: Earlier fits, which this one may continue.

    Attributes:
        parts: What the fit consists of, and its state.
        flow: What happens at each batch.
        account: What is said at the end.
    """

    def __init__(self, trainer: Trainer, callback: Any, settings: FitSettings, past: Past) -> None:
        self._trainer = trainer
        self.parts = parts = Parts(trainer, settings, past)
        self.flow, self.account = Flow(parts), Account(parts)
        self._best: dict[str, str] = {}
        with ExitStack() as changes:  # what was changed is taken back if the next change fails
            if parts.has_wrapped:
                changes.callback(setattr, trainer.strategy, "optimizers", [parts.optimizer.base])
                # Schedulers hold the base optimizer, whose groups the wrapper shares.
                trainer.strategy.optimizers = [parts.optimizer]
            changes.callback(self._release)
            self._let_decide()
            changes.callback(_compat.StepPatch(trainer.strategy, self.flow.around_step).remove)
            changes.callback(_compat_bar.BarPatch(trainer, lambda: parts.journal.shown).remove)
            self._changes = changes.pop_all()
        lead(trainer, callback)

    def _let_decide(self) -> None:
        self.parts.optimizer.approve = self.flow.approve if self.parts.is_deciding else None

    def start(self) -> None:
        """Find the batches of all groups; the training loader is there now."""
        if self._unlearns:
            self.account.averages = warn_about_averages(self._trainer)
        self.parts.start()
        self.account.movement = Movement(self._trainer, self.parts.optimizer)
        self.flow.start()

    def add_request(self, settings: FitSettings, name: str) -> None:
        """Take one more group into the problem, between two epochs; `settings` know of it already."""
        self.parts.add_request(settings, name)
        self._let_decide()

    def end_batch(self) -> None:
        """After a batch: log, stop, and open a new window where one has ended."""
        if self.flow.end_batch():
            self._best = best_checkpoints(self._trainer)

    def conclude(self) -> None:
        """At the end of training, judge and measure what has not been."""
        parts = self.parts
        self.flow.settle()  # others may have ended the fit
        parts.journal.publish_again()
        parts.journal.log_last()
        self.account.check_it_happened()
        if parts.guarding is not None:
            parts.guarding.conclude()
        self.account.conclude()
        self.flow.publish_levels()
        self.flow.batchnorm.thaw()

    def warn_about_stale_best(self) -> None:
        """Warn, after the fit, about a best checkpoint from before the last step."""
        if self._unlearns:
            warn_about_stale_best(self._best, best_checkpoints(self._trainer))

    @property
    def _unlearns(self) -> bool:
        return self.parts.turns is not None or not self.parts.optimizer.rule.is_plain

    def close(self) -> None:
        """Take back every change to the trainer, the module and its optimizer."""
        self.flow.batchnorm.thaw()
        self._changes.close()

    def _release(self) -> None:
        optimizer = self.parts.optimizer
        self.parts.groups.close()
        if self.parts.guarding is not None:
            self.parts.guarding.close()
        optimizer.release_forget()
        optimizer.approve = optimizer.referee = optimizer.recompute = None
        optimizer.region_limit = 1.0


def lead(trainer: Trainer, callback: Any) -> None:
    """Put a callback before the others.

    Another one that saves a checkpoint at the end of a batch then saves what belongs to the step that has ended. The
    list is replaced: the trainer may be going through the one that was there.
    """
    others = [other for other in trainer.callbacks if other is not callback]  # type: ignore[attr-defined]
    trainer.callbacks = [callback, *others]  # type: ignore[attr-defined]
