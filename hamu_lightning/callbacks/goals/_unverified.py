"""Steps that nobody has judged yet: they stand or fall together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hamu_lightning.callbacks.goals._kept_weights import KeptWeights
from hamu_lightning.callbacks.passes import ForgetPass, Recording
from hamu_lightning.gramian import widest_float
from hamu_lightning.optim import HAMUOptimizer, StepReport


@dataclass
class Batches:
    """The batches that a step was computed from, and what runs them again.

    Args:
        steps: For each group, retain among them, what runs a batch: the strategy's `training_step` or an objective.
        passes: What runs the batches of each group other than retain without a trace.
        recordings: For each group its batches, with the losses that came out.
    """

    steps: Mapping[str, Callable[..., Any]]
    passes: Mapping[str, ForgetPass]
    recordings: dict[str, list[Recording]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin without any."""
        self.recordings = {name: [] for name in ("retain", *self.passes)}

    @property
    def any_pass(self) -> ForgetPass:
        """One of the passes, for the retain batches."""
        return next(iter(self.passes.values()))

    def run_again(self) -> dict[str, tuple[Tensor, Tensor]]:
        """For each group the mean loss as it was, and at the present weights, 0-d each in float64."""
        found = {}
        for name, kept in self.recordings.items():
            run, step = self.passes.get(name, self.any_pass), self.steps[name]
            found[name] = mean_of([r.loss for r in kept]), mean_of([run.replay(step, r) for r in kept])
        return found


class UnverifiedSteps:
    """Sums up what steps promise, and knows the way back to before the first of them.

    Args:
        optimizer: Whose weights are the last verified ones.
        batches: Those of the first step; None in a resumed run, where nobody has them.
        state: What `state_dict` returned in the run that this one continues.

    Attributes:
        first: The batches of the first step.
        last: Those of the last one, where they were kept.
        taken: How many windows there were, those that moved nothing included.
        promised: For each group the sum of the promises, 0-d, counted positive where they serve.
        forgotten: The groups whose loss is to rise.
    """

    def __init__(
        self, optimizer: HAMUOptimizer, batches: Batches | None, state: Mapping[str, Any] | None = None
    ) -> None:
        self._optimizer, self._kept = optimizer, KeptWeights(optimizer)
        self.first = batches
        self.last: Batches | None = None
        self.taken = 0
        self.promised: dict[str, Tensor] = {}
        self.forgotten: tuple[str, ...] = ()
        self._report: tuple[StepReport, Tensor] | None = None
        if state is None:
            self._kept.keep()
            self._then, self._applied = optimizer.hamu_state_dict(), int(optimizer.applied_steps)
        else:
            self._kept.load_state_dict(state["kept"])
            self._then, self._applied = state["then"], state["applied"]

    def add(self, report: StepReport, moved: Tensor) -> None:
        """Take in what a step promised; `moved`, 0-d, is 0 where it moved nothing."""
        self.forgotten, self._report = report.coefficients.forgotten, (report, moved)
        for name, promise in report.coefficients.improvements.items():
            own = torch.where(moved.to(promise.device) > 0, promise, 0)
            self.promised[name] = self.promised[name] + own if name in self.promised else own

    def open_window(self) -> None:
        """Begin the next step."""
        self.taken, self._report = self.taken + 1, None

    @property
    def last_report(self) -> StepReport | None:
        """What the last step promised; None where it moved nothing. Reads the host."""
        return self._report[0] if self._report is not None and bool(self._report[1] > 0) else None

    @property
    def moved(self) -> int:
        """How many of the steps have moved the weights; reads the host."""
        return int(self._optimizer.applied_steps) - self._applied

    def take_back(self) -> int:
        """Put weights and state back as they were, and count the steps as undone; return how many had moved them."""
        moved = self.moved
        self._kept.restore()
        self._optimizer.undo_steps(moved, self._then)
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Return the way back; empty where there is none (of sharded weights each process has a part)."""
        kept = self._kept.state_dict()
        return {"kept": kept, "then": self._then, "applied": self._applied} if kept else {}


def mean_of(losses: list[Tensor]) -> Tensor:
    """The mean in float64; NaN without losses, which breaks every promise."""
    if not losses:
        return torch.tensor(math.nan, dtype=torch.float64)
    return torch.stack(losses).to(widest_float(losses[0].device)).mean()
