"""Verified steps: after each step both losses are measured again, and a step that breaks its promise is taken back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hamu_lightning.callbacks.goals._ledger import find_ledger
from hamu_lightning.callbacks.goals._promises import GroupOutcome, Outcome
from hamu_lightning.callbacks.passes import ForgetPass, Recording, copied, detached_loss
from hamu_lightning.checks import check_count, check_number, check_type, store
from hamu_lightning.gramian import widest_float
from hamu_lightning.optim import StepReport, Verdict
from hamu_lightning.randomness import capture_random
from hamu_lightning.wording import count

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# Below this region a step moves nothing, and still broke its promise.
_SMALLEST_REGION = 1e-6


@dataclass(frozen=True)
class VerifySteps:
    """Keep each step's promise: measure both losses again on the same batches, and undo a step that breaks it.

    A step is accepted if, on the batches that it was computed from,

    - the forget loss rose by at least `tolerance` times the promise, and by no more than 3 times the promise plus half
      of its value;
    - the retain loss rose by no more than 1.5 times the promised damage plus a tenth of its value.

    Both sides are needed, and the losses themselves besides the promise: where the trust region is far too large the
    promise is absurd itself. A broken step is taken back exactly (weights and the optimizer's state) and tried again
    with a trust region `shrink` times as large; after `max_tries` it is left out. Each verified step whose first try is
    accepted lets the region grow back by `grow`, up to the size that the rule gives it. So a learning rate or radius
    that is far too large costs time, but not the model.

    A base optimizer other than plain SGD makes steps of its own: their length is shortened instead of the region, and
    of the forget loss no more is asked than what the weights' actual change should give, to first order.

    "The same batches" means: as they were before the module edited them, with the same random numbers. What a module
    carries from batch to batch (a hidden state) is what it is after the step.

    Costs two forward passes per try, and copies of the weights, of the optimizer's state, and of the step's batches. An
    interrupt or an error while a step is judged takes it back first.

    Args:
        every: Verify every so many combined steps.
        tolerance: Share of the promised rise of the forget loss that has to come true, in [0, 1].
        shrink: Factor of the region after a broken promise, in (0, 1).
        grow: Factor after a kept one, at least 1.
        max_tries: How often a step is tried before it is left out.
        ledger: A CSV file that gets a line for each try, as it goes; True for `hamu_ledger.csv` in the directory of the
            Trainer's logger (no file without a logger), False for no file.

    Raises:
        HAMUValueError: If an argument is out of its range.

    Example:
        >>> VerifySteps(every=5).shrink
        0.5
    """

    every: int = 1
    tolerance: float = 0.5
    shrink: float = 0.5
    grow: float = 1.5
    max_tries: int = 3
    ledger: str | Path | bool = True

    def __post_init__(self) -> None:
        """Check the settings."""
        store(
            self,
            every=check_count("every", self.every),
            tolerance=check_number("tolerance", self.tolerance, least=0, most=1),
            shrink=check_number("shrink", self.shrink, above=0, below=1),
            grow=check_number("grow", self.grow, least=1),
            max_tries=check_count("max_tries", self.max_tries),
        )
        check_type("ledger", self.ledger, str | Path | bool, "the path of a CSV file, True or False")


class Verifier:
    """Judges the steps of a fit; the optimizer's referee.

    Args:
        trainer: The trainer.
        settings: What the user asked for.
    """

    def __init__(self, trainer: Trainer, settings: VerifySteps) -> None:
        self._trainer, self._settings = trainer, settings
        self._passes: dict[str, ForgetPass] = {}
        self._recordings: dict[str, list[Recording]] = {}
        self._steps: Mapping[str, Callable[..., Any]] = {}
        self.region = 1.0
        self.outcome: Outcome | None = None
        self.verified, self.kept, self.retried, self.dropped = 0, 0, 0, 0
        self._windows, self._tries = 0, 0
        self._ledger = find_ledger(trainer, settings.ledger)

    @property
    def is_due(self) -> bool:
        """Whether the step of the present window is to be judged."""
        return self._windows % self._settings.every == 0

    def open_window(self, steps: Mapping[str, Callable[..., Any]], passes: Mapping[str, ForgetPass]) -> None:
        """Begin the window of a combined step.

        Args:
            steps: For each group, retain among them, what runs a batch: the strategy's `training_step` or an objective.
            passes: What runs the batches of each group other than retain, and will run them again.
        """
        self._steps, self.outcome = steps, None
        self._passes = dict(passes)
        self._recordings = {"retain": []}
        for name, one in passes.items():
            kept = self._recordings[name] = []
            one.records = kept.append if self.is_due else None

    def close_window(self) -> None:
        """End it; the batches are let go."""
        self._windows += 1
        self._recordings = {}

    def run_retain(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the retain pass as it is, and keep its batch and its loss."""
        kept = copied(args[0]), capture_random(self._any_pass.generators)
        output = step(*args, **kwargs)
        loss = detached_loss(output)
        if loss is not None:
            self._recordings["retain"].append(Recording(*kept, args[1:], kwargs, None, loss))
        return output

    def judge(self, report: StepReport) -> Verdict:
        """Measure both losses again, and tell what is to become of the step. All processes judge alike."""
        self._tries += 1
        outcome = self.outcome = self._measure(report)
        is_kept = outcome.is_kept(self._settings.tolerance)
        is_last = self._tries >= self._settings.max_tries
        verdict: Verdict = "accept" if is_kept else "drop" if is_last else "retry"
        self._write(outcome, verdict)
        if is_kept and self._tries == 1:
            self.region = min(1.0, self.region * self._settings.grow)
        elif not is_kept:
            self.region *= self._settings.shrink
        if verdict != "retry":
            self.verified += 1
            self.kept += is_kept
            self.retried += is_kept and self._tries > 1
            self.dropped += not is_kept
            self._tries = 0
        return verdict

    def numbers(self) -> dict[str, Tensor]:
        """What is logged beside the step: promised and measured improvements, and the size of the region."""
        if self.outcome is None:
            return {}
        numbers = {n: x for n, x in self.outcome.numbers().items() if n.startswith(("promised_", "measured_"))}
        numbers["region"] = self.region
        return {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}

    def describe(self) -> str:
        """What came of the steps, in words."""
        if self.kept == self.verified != 1 and not self.retried:
            return f"All {self.verified} verified steps kept their promise"
        return (
            f"Of {count(self.verified, 'verified step')} {count(self.kept, 'kept its promise', 'kept their promise')} "
            f"({self.retried} of them in a smaller trust region), {count(self.dropped, 'was', 'were')} left out; the "
            f"region is {self.region:.3g} times the rule's"
        )

    @property
    def is_lost(self) -> bool:
        """Whether promises are broken however small the region."""
        return self.region < _SMALLEST_REGION

    def state_dict(self) -> dict[str, Any]:
        """Return the size of the region, the counts, and the place in the ledger."""
        ledger = {} if self._ledger is None else {"ledger": self._ledger.state_dict()}
        return {name: getattr(self, name) for name in _STATE} | ledger

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        for name in _STATE:
            setattr(self, name, state[name])
        if self._ledger is not None and "ledger" in state:
            self._ledger.load_state_dict(state["ledger"], self._trainer.global_step)

    @property
    def _any_pass(self) -> ForgetPass:
        return next(iter(self._passes.values()))

    def _measure(self, report: StepReport) -> Outcome:
        """Run the batches of all groups again; one read of the host."""
        step = report.coefficients
        rows = []
        for name, recordings in self._recordings.items():
            run = self._passes.get(name, self._any_pass)
            before = mean_of([r.loss for r in recordings])
            after = mean_of([run.replay(self._steps[name], r) for r in recordings])
            known = (step.improvements[name].to(before), report.improvement(name).to(before))
            rows.append(torch.stack((before, *known, after)))
        numbers = self._trainer.strategy.reduce(torch.stack(rows), reduce_op="mean").tolist()
        outcomes = {}
        for name, (loss, promised, due, new) in zip(self._recordings, numbers, strict=True):
            is_forgotten = name in step.forgotten
            change = new - loss if is_forgotten else loss - new
            outcomes[name] = GroupOutcome(is_forgotten, loss, promised, due, change, report.follows_rule)
        return Outcome(outcomes)

    def _write(self, outcome: Outcome, verdict: Verdict) -> None:
        if self._ledger is None:
            return
        row = {"step": self._trainer.global_step, "try": self._tries, "region": self.region}
        self._ledger.write({**row, **outcome.numbers(), "verdict": verdict})


_STATE = ("region", "verified", "kept", "retried", "dropped", "_windows")


def mean_of(losses: list[Tensor]) -> Tensor:
    """The mean in float64; NaN without losses, which breaks every promise."""
    if not losses:
        return torch.tensor(math.nan, dtype=torch.float64)
    return torch.stack(losses).to(widest_float(losses[0].device)).mean()
