"""A schedule in a fit: which of its rules makes the step of each accumulation window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hamu_lightning.callbacks import _compat
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.rules import Schedule

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Turns:
    """Gives the optimizer its rule, window by window, and counts.

    The position in the epoch is the Trainer's own, which it restores in a resumed run. Only the epoch in which
    unlearning began is kept here: a run may go on from the checkpoint of the training before.

    Args:
        trainer: The trainer.
        optimizer: Whose rule is set.
        schedule: What the rules are.
    """

    def __init__(self, trainer: Trainer, optimizer: HAMUOptimizer, schedule: Schedule) -> None:
        self._trainer, self._optimizer, self._schedule = trainer, optimizer, schedule
        self._first_epoch: int | None = None
        self._turn = 0
        self._counts = [0] * len(schedule.rules)
        self._before = list(self._counts)

    def open_window(self) -> bool:
        """Set the rule of the window, and return whether it needs the gradients of the other groups."""
        epoch = self._trainer.current_epoch
        self._first_epoch = epoch if self._first_epoch is None else min(epoch, self._first_epoch)
        rules = self._schedule.rules
        rule = self._schedule.rule_at(epoch - self._first_epoch, _compat.step_in_epoch(self._trainer))
        if rule not in rules:
            raise HAMUValueError(
                f"Expected one of the rules of {self._schedule} at each step, but got {rule!r}. List it in `rules`."
            )
        self._turn = rules.index(rule)
        if rule != self._optimizer.rule:
            self._optimizer.rule = rule
        return not rule.is_plain

    def close_window(self) -> None:
        """Count its step."""
        self._counts[self._turn] += 1

    @property
    def counts(self) -> dict[str, int]:
        """How many steps each rule was asked for."""
        return dict(zip(map(str, self._schedule.rules), self._counts, strict=True))

    def numbers(self) -> dict[str, Tensor]:
        """What is logged at each step: which rule made it, counted from 0."""
        return {"turn": torch.tensor(float(self._turn))}

    def describe(self) -> str:
        """The counts of this fit in words."""
        pairs = zip(self.counts.items(), self._before, strict=True)
        return "Steps by turns: " + ", ".join(f"{count - before} of {rule}" for (rule, count), before in pairs)

    def state_dict(self) -> dict[str, Any]:
        """Return the first epoch and the counts, in numbers."""
        return {"first_epoch": self._first_epoch, "counts": list(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned; with another number of rules the counts begin anew."""
        self._first_epoch = state.get("first_epoch")
        if len(state.get("counts", ())) == len(self._counts):
            self._counts, self._before = list(state["counts"]), list(state["counts"])
