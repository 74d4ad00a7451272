"""What a fit with unlearning tells: logged scalars, the progress bar, the summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hamu_lightning.callbacks import _compat
from hamu_lightning.metrics import RunningObjective
from hamu_lightning.optim import StepReport

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Journal:
    """Keeps the two objectives, and logs them with each step's numbers at the trainer's logging steps.

    Args:
        trainer: The trainer.
        progress_bar: Whether `forget/loss` and `hamu/margin` are shown there.
    """

    def __init__(self, trainer: Trainer, progress_bar: bool) -> None:
        self._trainer = trainer
        self._shown = {"forget/loss", "hamu/margin"} if progress_bar else set()
        device = trainer.strategy.root_device
        self._retain, self._forget = RunningObjective().to(device), RunningObjective().to(device)

    def add_retain(self, loss: Tensor) -> None:
        """Add the loss of a retain batch."""
        self._retain.update(loss)

    def add_forget(self, loss: Tensor) -> None:
        """Add the loss of a forget batch."""
        self._forget.update(loss)

    def log_module(self, logged: dict[str, tuple[Tensor, dict[str, Any]]]) -> None:
        """Log again, as `forget/<name>`, what the module logged in its forget pass."""
        for name, (value, arguments) in logged.items():
            if name != "loss":  # `forget/loss` is ours, and the same number
                self._trainer.lightning_module.log(f"forget/{name}", value, **arguments)

    def log_step(self, report: StepReport | None, more: dict[str, Tensor]) -> None:
        """Log the step, both objectives (means since the last logging step) and more, with one read of the host.

        None stands for a step without a report (left out, or plain). Lightning would log the last one's numbers again.
        """
        if self._trainer.barebones or not _compat.is_logging_step(self._trainer):
            return
        if report is None:
            _compat.withdraw_logged(self._trainer, "hamu/")
            return
        numbers = {f"hamu/{name}": value for name, value in (report.summary() | more).items()}
        numbers |= {"retain/loss": self._retain.close_window(), "forget/loss": self._forget.close_window()}
        device = self._trainer.strategy.root_device
        values = torch.stack([value.to(device, torch.float32) for value in numbers.values()]).tolist()
        for name, value in zip(numbers, values, strict=True):
            self._trainer.lightning_module.log(name, value, on_step=True, on_epoch=False, prog_bar=name in self._shown)

    def state_dict(self) -> dict[str, Any]:
        """Return what both objectives have summed up, in tensors."""
        return {name: objective.save() for name, objective in self._objectives()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        for name, objective in self._objectives():
            if name in state:
                objective.load(state[name])

    def _objectives(self) -> tuple[tuple[str, RunningObjective], tuple[str, RunningObjective]]:
        return ("retain", self._retain), ("forget", self._forget)

    def summary(self) -> str:
        """The way of both losses, in words: means over the first and the last window."""
        return f"forget loss {_describe(self._forget)}, retain loss {_describe(self._retain)}"


def _describe(objective: RunningObjective) -> str:
    if objective.update_called:
        objective.close_window()
    if objective.start is None or objective.latest is None:
        return "unknown (no batch)"
    return f"{float(objective.start):.4g} -> {float(objective.latest):.4g}"
