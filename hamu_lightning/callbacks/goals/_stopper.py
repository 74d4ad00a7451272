"""Ends a fit by itself: asks the conditions before each step, and goes back where a ceiling was passed."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks.goals._conditions import CEILINGS, StopCondition, StopReason
from hamu_lightning.callbacks.goals._kept_weights import KeptWeights
from hamu_lightning.callbacks.goals._score import compute_score
from hamu_lightning.callbacks.goals._signals import NUMBERS, Signals, pack_signals
from hamu_lightning.optim import HAMUOptimizer, StepReport

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Stopper:
    """Decides before each step whether it is applied; all processes decide alike.

    Args:
        trainer: The trainer.
        optimizer: The optimizer whose steps they are.
        conditions: What to stop on.
        state: The state of an earlier run under the same rule and conditions, or an empty dict.

    Attributes:
        reason: Why the fit ends; None while it goes on.
        message: The same in words, with numbers.
        told: The line for the end of the fit that says so; None where it did not end it, or has said so already.
    """

    def __init__(
        self, trainer: Trainer, optimizer: HAMUOptimizer, conditions: tuple[StopCondition, ...], state: dict[str, Any]
    ) -> None:
        self._trainer, self._conditions = trainer, conditions
        self._kept = KeptWeights(optimizer)
        self._has_ceiling = any(condition.reason in CEILINGS for condition in conditions)
        self._needs_bound = any(condition.needs_bound for condition in conditions)
        self._monitor = StopMonitor(conditions)
        self._score: float | None = None
        self.told: str | None = None
        self.reason: StopReason | None = None
        self.message: str | None = None
        if state:
            self._monitor.load_state_dict(state["steps"])
            self.reason = None if state["reason"] is None else StopReason(state["reason"])
            self.message = state["message"]
            if self.reason is None and self._has_ceiling:
                self._kept.load_state_dict(state.get("kept", {}))

    def approves(
        self,
        report: StepReport,
        retain_losses: list[Tensor],
        forget_losses: list[Tensor],
        target: Tensor | None,
        level: Tensor | None = None,
    ) -> bool:
        """Whether a step is to be applied; reads one packed tensor on the host.

        Args:
            report: What the rule chose.
            retain_losses: The losses of the window, 0-d each.
            forget_losses: Likewise.
            target: Where the forget loss should end, 0-d.
            level: Where it is on the whole set, as it is followed, 0-d.
        """
        if self.reason is not None:
            return False
        losses = torch.stack(retain_losses).mean(), torch.stack(forget_losses).mean()
        numbers = pack_signals(report, *losses, needs_bound=self._needs_bound)
        numbers = self._trainer.strategy.reduce(numbers, reduce_op="mean")
        bound = "forget" if report.coefficients.constrained == 1 else "retain"
        signals = Signals(**dict(zip(NUMBERS, numbers.tolist(), strict=True)), bound=bound)
        aim = (None if number is None else float(number) for number in (target, level))
        self._score = compute_score(signals, self._conditions, *aim)
        found = self._monitor.judge(signals)
        if found is not None:
            reason, message = found
            conflict = report.coefficients.conflict() if reason is StopReason.INFEASIBLE else ()
            if reason in CEILINGS:
                message += f" {_BACK if self._kept.are_there else _NO_WAY_BACK}"
            self.stop(reason, message + (f" In the way: {', '.join(conflict)}." if conflict else ""))
        elif self._has_ceiling:
            self._kept.keep()
        return found is None

    def stop(self, reason: StopReason, message: str) -> None:
        """Let no further step pass; the first reason counts."""
        if self.reason is None:
            self.reason, self.message = reason, message

    def start_over(self, *, goes_on: bool = False) -> None:
        """The weights went back to an earlier step: what was seen since, and what was kept, says nothing of them.

        Args:
            goes_on: Whether a reason to stop that was found since is none any more.
        """
        if goes_on:
            self.reason = self.message = None
        self._kept.release()
        self._monitor = StopMonitor(self._conditions)

    def end_fit(self) -> None:
        """At the end of a step: end the fit if there is a reason to."""
        trainer = self._trainer
        if self.reason is None or trainer.should_stop:
            return
        if self.reason in CEILINGS:
            self._kept.restore()
        self._kept.release()
        told = f"HAMU stops at step {trainer.global_step}, {self.reason.value}: {self.message}"
        if _compat.can_stop(trainer):
            self.told = told
        else:
            rank_zero_info(f"{told} Nothing changes until `min_steps` and `min_epochs` are over.")
        trainer.should_stop = True

    def numbers(self) -> dict[str, Tensor]:
        """What is logged beside the step."""
        return {} if self._score is None else {"score": torch.tensor(self._score, dtype=torch.float64)}

    def state_dict(self) -> dict[str, Any]:
        """Return the reason, the last steps, and the weights to go back to while that may come, in plain values."""
        reason, kept = None if self.reason is None else self.reason.value, self._kept.state_dict()
        numbers = {"reason": reason, "message": self.message, "steps": self._monitor.state_dict()}
        return {**numbers, "kept": kept} if kept else numbers


_BACK = "The model goes back to where it was below."
_NO_WAY_BACK = "There was no step below it: the model stays as it is."


class StopMonitor:
    """Follows the steps, and says when a condition holds.

    Args:
        conditions: The conditions; the first one that holds is the reason.
    """

    def __init__(self, conditions: tuple[StopCondition, ...]) -> None:
        self._conditions = conditions
        longest = max((c.patience for c in conditions), default=1)
        self._steps: deque[Signals] = deque(maxlen=longest)

    def judge(self, signals: Signals) -> tuple[StopReason, str] | None:
        """Take a step in; return the reason to stop before it and why, or None."""
        self._steps.append(signals)
        for condition in self._conditions:
            if len(self._steps) < condition.patience:
                continue
            why = condition.explain(list(self._steps)[-condition.patience :])
            if why is not None:
                return condition.reason, why
        return None

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the last steps in numbers."""
        return [dict(vars(signals)) for signals in self._steps]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Go on with what `state_dict` returned."""
        self._steps.extend(Signals(**signals) for signals in state)
