"""What a fit with unlearning tells: logged scalars, the progress bar, numbers for monitors, the summary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks._course import Course, have_parted
from hamu_lightning.optim import StepReport

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# A fit whose length is known is logged so often at least, however long the Trainer's interval is.
_POINTS = 20
# Promised and measured rise are compared every so many combined steps, until they have parted.
_COMPARED_EVERY = 50


class Journal:
    """Keeps the objective of each group, and logs them with each step's numbers at the trainer's logging steps.

    Args:
        trainer: The trainer.
        groups: For each group of the rule what its batches are said to have: a "loss", or the value of an "objective".
        progress_bar: Whether the losses of the groups to forget and protect, their levels where there is a target, and
            `hamu/margin` are shown there.

    Attributes:
        shown: What the progress bar shows first: of each group to forget the loss, and the target where there is one.
    """

    def __init__(self, trainer: Trainer, groups: Mapping[str, str], progress_bar: bool) -> None:
        self._trainer, self._progress_bar = trainer, progress_bar
        self._courses: dict[str, Course] = {}
        self._what: dict[str, str] = {}
        self._ended: set[str] = set()
        self._elsewhere: set[str] = set()
        self._published: dict[str, Tensor] = {}
        self._promises, self._is_warned = 0, False
        self._steps, self._every = 0, 0
        self._unlogged: tuple[Any, ...] | None = None
        self.shown: dict[str, str] = {}
        for group, what in groups.items():
            self.add_group(group, what)

    def add_group(self, name: str, what: str) -> None:
        """Follow one more group."""
        self._courses[name], self._what[name] = Course(self._trainer.strategy.root_device), f"{name} {what}"

    def end_group(self, name: str) -> None:
        """Log a group no more that has left the problem."""
        self._ended.add(name)
        _compat.withdraw_logged(self._trainer, f"{name}/")

    def begin_group(self, name: str) -> None:
        """Log a group again that has come back."""
        self._ended.discard(name)

    def add_loss(self, group: str, loss: Tensor) -> None:
        """Add the loss of a batch."""
        self._courses[group].add(loss)

    def add_promises(self, report: StepReport, moved: Tensor, watched: Iterable[str]) -> None:
        """Sum up what a step promised to those that it forgets; warn once where the losses do not follow.

        Args:
            report: The step.
            moved: 0-d, 0 if it moved nothing.
            watched: For which groups to warn: those that no target leads.
        """
        for name in report.coefficients.forgotten:
            self._courses[name].add_promise(report.improvement(name), moved=moved)
        self._promises += 1
        if self._promises % _COMPARED_EVERY == 0 and not self._is_warned:
            self._compare(watched)

    def take_promises_back(self, promised: Mapping[str, Tensor]) -> None:
        """Steps were taken back that had promised so much to those that they forget."""
        for name, promise in promised.items():
            self._courses[name].add_promise(-promise, moved=torch.ones_like(promise))

    @property
    def has_warned(self) -> bool:
        """Whether it was said that promises and losses have parted."""
        return self._is_warned

    def _compare(self, watched: Iterable[str]) -> None:
        for name, numbers in self._numbers(watched).items():
            if not self._is_warned and have_parted(*numbers):
                self._is_warned = True
                start, end, *_, promised = numbers
                rank_zero_warn(
                    f"After {self._promises} steps the {self._what[name]} has changed by {end - start:+.3g}, and the "
                    f"steps promised {promised:+.3g} in sum. A promise holds for the step's own batch and small steps: "
                    "what one batch gains, the next steps may take back. Larger forget batches or `target=...`, which "
                    "measures the whole set, prevent that; with an optimizer other than plain SGD also "
                    "StepOptions(exact=True)."
                )

    def log_module(self, group: str, logged: dict[str, tuple[Tensor | Metric, dict[str, Any]]]) -> None:
        """Log again, as `forget/<name>`, what the module logged in the pass of a group (here: forget).

        What is logged at steps alone, at the trainer's logging steps: nobody writes it in between.
        """
        is_written = _compat.is_logging_step(self._trainer)
        for name, (value, arguments) in logged.items():
            # `forget/loss` is ours, and the same number.
            if name != "loss" and (is_written or arguments["on_epoch"]):
                self._trainer.lightning_module.log(self._own_name(f"{group}/{name}"), value, **arguments)

    def log_step(
        self, report: StepReport | None, more: dict[str, Tensor], always: dict[str, Tensor], *, stops: bool = False
    ) -> None:
        """Log the step, the objectives (means since the last logging step) and more, with one read of the host.

        Besides the trainer's logging steps that are the first step of the fit and the last one, and one in twenty of a
        fit of known length; not under a schedule, where `always` has something. `stops` says that the trainer is about
        to be stopped, and then logs. None stands for a step without a report (left out, or plain). Lightning would log
        the last one's numbers again: they are withdrawn, and what is in `always` is logged with the objectives that
        have had a batch since.
        """
        if self._trainer.barebones:
            return
        is_regular = stops or _compat.is_logging_step(self._trainer)
        is_due = report is not None and not always and self._is_due()
        if not (is_regular or is_due):
            self._unlogged = (report, more, always) if report is not None else self._unlogged
            return
        if report is None:
            _compat.withdraw_logged(self._trainer, "hamu/")
            if not always:
                return
        numbers, shown = self._read(report, more, always)
        for name, value in numbers.items():
            self._trainer.lightning_module.log(name, value, on_step=True, on_epoch=False, prog_bar=name in shown)
        if not is_regular:
            _compat.write_logged(self._trainer, numbers)

    def log_last(self) -> None:
        """At the end of the fit, log its last step, if that has not been done."""
        if self._unlogged is not None:
            numbers, _ = self._read(*self._unlogged)
            self._trainer.callback_metrics.update({name: torch.tensor(value) for name, value in numbers.items()})
            _compat.write_logged(self._trainer, numbers, step=max(self._trainer.global_step - 1, 0))

    def _is_due(self) -> bool:
        """Count a step; whether it is to be logged besides those of the trainer."""
        self._steps += 1
        if self._steps == 1:
            planned = _compat.count_steps(self._trainer)
            self._every = max(1, int(planned) // _POINTS) if math.isfinite(planned) else 0
        is_last = _compat.has_ended(self._trainer)
        return self._steps == 1 or is_last or (self._every > 0 and self._steps % self._every == 0)

    def _read(
        self, report: StepReport | None, more: dict[str, Tensor], always: dict[str, Tensor]
    ) -> tuple[dict[str, float], set[str]]:
        """The numbers of a step by name, and the names of those that the progress bar shows besides `shown`."""
        self._unlogged = None
        summary = {} if report is None else report.summary() | more
        numbers = {f"hamu/{name}": value for name, value in (summary | always).items()}
        windows = {name: course.windows for name, course in self._courses.items()}
        present = [n for n, o in windows.items() if report is not None or o.update_called]
        for name in set(windows) - set(present):
            _compat.withdraw_logged(self._trainer, f"{name}/")
        own = {n: self._own_name(f"{n}/loss") for n in present if n not in self._ended}
        numbers |= {name: windows[n].close_window() for n, name in own.items()}
        levels = {name for name in numbers if name.endswith("forget_level")}
        extra = {"hamu/margin", *levels, *own.values()} - {"retain/loss"} if self._progress_bar else set()
        device = self._trainer.strategy.root_device
        values = torch.stack([value.to(device, torch.float32) for value in numbers.values()]).tolist()
        read = dict(zip(numbers, values, strict=True))
        if report is not None:
            self.shown = {n: _show(n, name, read) for n, name in own.items() if n in report.coefficients.forgotten}
        return read, extra

    def publish_epoch(self, numbers: Mapping[str, Tensor]) -> None:
        """At the end of an epoch, give `callback_metrics` the means of the losses over it, and more numbers.

        Monitors (`EarlyStopping`, `ModelCheckpoint`, `ReduceLROnPlateau`) find them there in each epoch, however rarely
        steps are logged; loggers see nothing of it.
        """
        ended = {name: course.end_epoch() for name, course in self._courses.items() if name not in self._ended}
        sums = self._trainer.strategy.reduce(torch.stack([*ended.values()]), reduce_op="sum")
        losses = {self._own_name(f"{n}/loss"): s[0] / s[1] for n, s in zip(ended, sums, strict=True) if s[1] > 0}
        self._published = {name: value.detach().float() for name, value in (losses | dict(numbers)).items()}
        self.publish_again()

    def publish_again(self) -> None:
        """Give `callback_metrics` the last epoch's numbers once more, at the end of the fit."""
        self._trainer.callback_metrics.update(self._published)

    def _own_name(self, name: str) -> str:
        """The name to log by: with `hamu/` before it where the module logs by the same name, so that both are kept."""
        if name not in self._elsewhere and name in _compat.names_of_others(self._trainer):
            self._elsewhere.add(name)
            rank_zero_warn(
                f"The module logs {name!r} itself, and so do unlearning's own numbers: those are in 'hamu/{name}'."
            )
        return f"hamu/{name}" if name in self._elsewhere else name

    def state_dict(self) -> dict[str, Any]:
        """Return what the objectives have summed up, in tensors."""
        return {name: course.state_dict() for name, course in self._courses.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        for name, course in self._courses.items():
            if name in state:
                course.load_state_dict(state[name])

    def path(self, group: str) -> tuple[float, float]:
        """The loss of a group at the start and at the end of this fit; NaN without a batch. All processes ask alike."""
        start, end, *_ = self._numbers([group])[group]
        return start, end

    def _numbers(self, groups: Iterable[str]) -> dict[str, list[float]]:
        """`Course.numbers` of groups, means over processes; one read of the host."""
        names = list(groups)
        if not names:
            return {}
        rows = torch.stack([self._courses[name].numbers() for name in names])
        return dict(zip(names, self._trainer.strategy.reduce(rows, reduce_op="mean").tolist(), strict=True))

    def summary(self, means: Mapping[str, tuple[float, float]]) -> list[str]:
        """The way of the losses in this fit, in lines.

        Args:
            means: Of groups whose loss was measured on the whole set before and after, in evaluation mode: both. Of
                the others batches are known, as they were trained on: means over a tenth of them, ten at most.
        """
        for course in self._courses.values():
            if course.windows.update_called:
                course.windows.close_window()
        retain, *others = self._courses
        told = [f"{name} loss {a:.4g} -> {b:.4g}." for name, (a, b) in means.items()]
        seen = [f"{self._what[name]} {self._describe(name)}" for name in (*others, retain) if name not in means]
        return [*told, *(f"{way} on training batches." for way in seen)]

    def describe_run(self) -> str:
        """The way of the losses in the run that this fit continues, in words: means between logging steps."""
        ends = {name: (course.windows.start, course.windows.latest) for name, course in self._courses.items()}
        told = {n: f"{float(a):.4g} -> {float(b):.4g}" for n, (a, b) in ends.items() if a is not None and b is not None}
        return ", ".join(f"{self._what[name]} {way}" for name, way in told.items())

    def describe_promises(self, groups: Iterable[str]) -> str:
        """What the steps of this fit promised to each group that is forgotten, and what was measured; may be empty."""
        seen = [name for name in groups if self._courses[name].batches]
        found = {name: numbers for name, numbers in self._numbers(seen).items() if numbers[-1]}
        told = [f"{self._what[n]} {p:+.3g} (measured {end - start:+.3g})" for n, (start, end, *_, p) in found.items()]
        return f"Promised in sum: {', '.join(told)}." if told else ""

    def _describe(self, group: str) -> str:
        start, end = self.path(group)
        return f"{start:.4g} -> {end:.4g}" if self._courses[group].batches else "unknown (no batch)"


def _show(group: str, name: str, numbers: Mapping[str, float]) -> str:
    """The loss of a group, as "level/target" where there is one."""
    prefix = "hamu/" if f"hamu/{group}_target" not in numbers else f"hamu/{group}_"
    level, target = numbers.get(f"{prefix}forget_level"), numbers.get(f"{prefix}target")
    return f"{numbers[name]:.3g}" if level is None or target is None else f"{level:.3g}/{target:.3g}"
