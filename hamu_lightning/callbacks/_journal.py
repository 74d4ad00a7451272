"""What a fit with unlearning tells: logged scalars, the progress bar, the summary."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hamu_lightning.callbacks import _compat
from hamu_lightning.metrics import RunningObjective
from hamu_lightning.optim import StepReport

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Journal:
    """Keeps the objective of each group, and logs them with each step's numbers at the trainer's logging steps.

    Args:
        trainer: The trainer.
        groups: The groups of the rule.
        progress_bar: Whether the losses of the groups to forget and protect, and `hamu/margin`, are shown there.
    """

    def __init__(self, trainer: Trainer, groups: Iterable[str], progress_bar: bool) -> None:
        self._trainer, self._progress_bar = trainer, progress_bar
        self._objectives: dict[str, RunningObjective] = {}
        self._ended: set[str] = set()
        for group in groups:
            self.add_group(group)

    def add_group(self, name: str) -> None:
        """Follow one more group."""
        self._objectives[name] = RunningObjective().to(self._trainer.strategy.root_device)

    def end_group(self, name: str) -> None:
        """Log a group no more that has left the problem."""
        self._ended.add(name)
        _compat.withdraw_logged(self._trainer, f"{name}/")

    def add_loss(self, group: str, loss: Tensor) -> None:
        """Add the loss of a batch."""
        self._objectives[group].update(loss)

    def log_module(self, group: str, logged: dict[str, tuple[Tensor, dict[str, Any]]]) -> None:
        """Log again, as `forget/<name>`, what the module logged in the pass of a group (here: forget)."""
        for name, (value, arguments) in logged.items():
            if name != "loss":  # `forget/loss` is ours, and the same number
                self._trainer.lightning_module.log(f"{group}/{name}", value, **arguments)

    def log_step(self, report: StepReport | None, more: dict[str, Tensor], always: dict[str, Tensor]) -> None:
        """Log the step, the objectives (means since the last logging step) and more, with one read of the host.

        None stands for a step without a report (left out, or plain). Lightning would log the last one's numbers again:
        they are withdrawn, and what is in `always` is logged with the objectives that have had a batch since.
        """
        if self._trainer.barebones or not _compat.is_logging_step(self._trainer):
            return
        if report is None:
            _compat.withdraw_logged(self._trainer, "hamu/")
            if not always:
                return
        summary = {} if report is None else report.summary() | more
        numbers = {f"hamu/{name}": value for name, value in (summary | always).items()}
        present = [n for n, o in self._objectives.items() if report is not None or o.update_called]
        for name in set(self._objectives) - set(present):
            _compat.withdraw_logged(self._trainer, f"{name}/")
        losses = {f"{n}/loss": self._objectives[n].close_window() for n in present if n not in self._ended}
        numbers |= losses
        shown = {"hamu/margin", *losses} - {"retain/loss"} if self._progress_bar else set()
        device = self._trainer.strategy.root_device
        values = torch.stack([value.to(device, torch.float32) for value in numbers.values()]).tolist()
        for name, value in zip(numbers, values, strict=True):
            self._trainer.lightning_module.log(name, value, on_step=True, on_epoch=False, prog_bar=name in shown)

    def state_dict(self) -> dict[str, Any]:
        """Return what the objectives have summed up, in tensors."""
        return {name: objective.save() for name, objective in self._objectives.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        for name, objective in self._objectives.items():
            if name in state:
                objective.load(state[name])

    def path(self, group: str) -> tuple[float, float]:
        """The mean loss of a group over the first and over the last window; NaN without a batch."""
        objective = self._objectives[group]
        if objective.update_called:
            objective.close_window()
        ends = objective.start, objective.latest
        return tuple(math.nan if end is None else float(end) for end in ends)  # type: ignore[return-value]

    def summary(self) -> str:
        """The way of the losses, in words: means over the first and the last window."""
        retain, *others = self._objectives
        return ", ".join(f"{name} loss {self._describe(name)}" for name in (*others, retain))

    def _describe(self, group: str) -> str:
        start, latest = self.path(group)
        return "unknown (no batch)" if math.isnan(latest) else f"{start:.4g} -> {latest:.4g}"
