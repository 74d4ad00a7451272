"""Verified steps: after each step both losses are measured again, and a step that breaks its promise is taken back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hamu_lightning.callbacks.goals._ledger import find_ledger
from hamu_lightning.callbacks.goals._promises import GroupOutcome, Outcome
from hamu_lightning.callbacks.goals._unverified import Batches, UnverifiedSteps
from hamu_lightning.callbacks.passes import ForgetPass, Recording, copied, detached_loss
from hamu_lightning.checks import check_choice, check_count, check_number, check_type, store
from hamu_lightning.optim import StepReport, Verdict
from hamu_lightning.randomness import capture_random
from hamu_lightning.wording import count

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from hamu_lightning.optim import HAMUOptimizer

# Below this region a step moves nothing, and still broke its promise.
_SMALLEST_REGION = 1e-6
# So many steps are verified together at most, with `every="auto"`.
_MOST_TOGETHER = 8


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

    With `every="auto"` steps are verified together: one, then two, four, at most eight, while promises are kept. Of
    those since the last verified weights, the last is judged as above; and all of them at once, on the batches of the
    first, where losses may have gone as far as the upper bounds above allow, once for each step. Where either is broken
    all of them are taken back, as if they had not been (weights, the optimizer's state, counts; levels are measured
    anew), and the next ones are verified one by one. What is measured beside the steps, the end of an epoch or a fit,
    and a reason to stop see verified weights only; an interrupt takes back what is not verified yet. A checkpoint that
    is saved in between holds the last verified weights too, and a resumed run goes on from those. Costs four forward
    passes for so many steps, a copy of weights and state all the time, and steps where promises are broken. Steps that
    do not follow the rule (other bases than plain SGD, coarse weights), or with `track_actual`, are verified one by
    one.

    Args:
        every: Verify every so many combined steps, each by itself; "auto": all, up to eight together.
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

    every: int | Literal["auto"] = 1
    tolerance: float = 0.5
    shrink: float = 0.5
    grow: float = 1.5
    max_tries: int = 3
    ledger: str | Path | bool = True

    def __post_init__(self) -> None:
        """Check the settings."""
        if isinstance(self.every, str):
            check_choice("every", self.every, ["auto"])
        else:
            store(self, every=check_count("every", self.every))
        store(
            self,
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
        optimizer: Whose steps they are.
        settings: What the user asked for.

    Attributes:
        region: What the radius of the rule is multiplied by.
        outcome: What was measured last, in the present window; None before.
        together: How many steps are verified together.
        waiting: The steps that nobody has judged yet; None where there are none.
    """

    def __init__(self, trainer: Trainer, optimizer: HAMUOptimizer, settings: VerifySteps) -> None:
        self._trainer, self._optimizer, self._settings = trainer, optimizer, settings
        self._batches: Batches | None = None  # of the present window, where they are needed
        self.region = 1.0
        self.outcome: Outcome | None = None
        self.verified, self.kept, self.retried, self.dropped = 0, 0, 0, 0
        self._windows, self._tries = 0, 0
        self.together = 1
        self.waiting: UnverifiedSteps | None = None
        self._ledger = find_ledger(trainer, settings.ledger)

    @property
    def is_due(self) -> bool:
        """Whether the step of the present window is to be judged by itself."""
        every = self._settings.every
        return self.together == 1 if every == "auto" else self._windows % every == 0

    def open_window(self, steps: Mapping[str, Callable[..., Any]], passes: Mapping[str, ForgetPass]) -> None:
        """Begin the window of a combined step.

        Args:
            steps: For each group, retain among them, what runs a batch: the strategy's `training_step` or an objective.
            passes: What runs the batches of each group other than retain, and will run them again.
        """
        self.outcome, waiting = None, self.waiting
        batches: Batches | None = Batches(steps, dict(passes))
        if waiting is None and self.together > 1:
            waiting = self.waiting = UnverifiedSteps(self._optimizer, batches)
        elif waiting is not None and waiting.taken == self.together - 1:
            waiting.last = batches
        elif not self.is_due:
            batches = None
        if waiting is not None:
            waiting.open_window()
        for name, one in passes.items():
            one.records = None if batches is None else batches.recordings[name].append
        self._batches = batches

    def close_window(self) -> None:
        """End it; the batches are let go, unless steps wait for their judgement."""
        self._windows += 1
        self._batches = None

    def run_retain(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the retain pass as it is, and keep its batch and its loss where they are needed."""
        if self._batches is None:
            return step(*args, **kwargs)
        kept = copied(args[0]), capture_random(self._batches.any_pass.generators)
        output = step(*args, **kwargs)
        loss = detached_loss(output)
        if loss is not None:
            self._batches.recordings["retain"].append(Recording(*kept, args[1:], kwargs, None, loss))
        return output

    def judge(self, report: StepReport) -> Verdict:
        """Measure both losses again, and tell what is to become of the step. All processes judge alike."""
        self._tries += 1
        assert self._batches is not None
        outcome = self.outcome = self._measure_step(self._batches, report)
        is_kept = outcome.is_kept(self._settings.tolerance)
        is_last = self._tries >= self._settings.max_tries
        verdict: Verdict = "accept" if is_kept else "drop" if is_last else "retry"
        self._write(outcome, verdict)
        if is_kept and self._tries == 1:
            self._trust()
            # Where the weights do not follow the rule, nobody knows what is due of steps that were not measured.
            can_wait = self._settings.every == "auto" and report.follows_rule and report.actual_changes is None
            self.together = 2 if can_wait else 1
        elif not is_kept:
            self.region *= self._settings.shrink
        if verdict != "retry":
            self.verified += 1
            self.kept += is_kept
            self.retried += is_kept and self._tries > 1
            self.dropped += not is_kept
            self._tries = 0
        return verdict

    def note(self, report: StepReport, moved: Tensor) -> None:
        """Take in what a step promised that waits for its judgement; `moved`, 0-d, is 0 where it moved nothing."""
        if self.waiting is not None:
            self.waiting.add(report, moved)

    @property
    def are_enough(self) -> bool:
        """Whether as many steps wait as are verified together."""
        return self.waiting is not None and self.waiting.taken >= self.together

    def settle(self) -> UnverifiedSteps | None:
        """Judge the steps that wait, if any; return them if they were taken back. All processes judge alike."""
        waiting = self.waiting
        number = 0 if waiting is None else waiting.moved
        if waiting is None or not number:
            self.waiting = None
            return None
        if waiting.first is None or not self._are_kept(waiting, waiting.first, number):
            return self.take_back()
        self.verified, self.kept = self.verified + number, self.kept + number
        self._trust()
        if self.are_enough:
            self.together = min(2 * self.together, _MOST_TOGETHER)
        self.waiting = None
        return None

    def _are_kept(self, waiting: UnverifiedSteps, first: Batches, number: int) -> bool:
        """Whether all steps together did no harm that they did not promise, and the last one kept its own promise."""
        # No step promises anything for the batches of the first but that it does them no harm.
        together = self._measure(first, waiting.promised, waiting.promised, waiting.forgotten, number)
        is_kept = together.is_harmless()
        self._write(together, "accept" if is_kept else "back", number)
        self.outcome, report = together, waiting.last_report
        if is_kept and waiting.last is not None and report is not None:
            self.outcome = self._measure_step(waiting.last, report)
            is_kept = self.outcome.is_kept(self._settings.tolerance)
            self._write(self.outcome, "accept" if is_kept else "back")
        return is_kept

    def take_back(self) -> UnverifiedSteps | None:
        """Take the steps that wait back, if any; return them. The next ones are verified one by one."""
        waiting = self.waiting
        if waiting is not None:
            number = waiting.take_back()
            self.verified, self.dropped = self.verified + number, self.dropped + number
            self.together, self.waiting = 1, None
        return waiting

    def _trust(self) -> None:
        """A promise was kept at once: let the region grow back."""
        self.region = min(1.0, self.region * self._settings.grow)

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
        """Return the size of the region, the counts, the way back of what waits, and the place in the ledger."""
        ledger = {} if self._ledger is None else {"ledger": self._ledger.state_dict()}
        waiting = {} if self.waiting is None else self.waiting.state_dict()
        return {name: getattr(self, name) for name in _STATE} | ledger | ({"waiting": waiting} if waiting else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned; steps that wait are taken back when they are settled."""
        for name in _STATE:
            setattr(self, name, state.get(name, getattr(self, name)))
        if "waiting" in state:
            self.waiting = UnverifiedSteps(self._optimizer, None, state["waiting"])
        if self._ledger is not None and "ledger" in state:
            self._ledger.load_state_dict(state["ledger"], self._trainer.global_step)

    def _measure_step(self, batches: Batches, report: StepReport) -> Outcome:
        """What a step did, on its own batches."""
        step = report.coefficients
        due = {name: report.improvement(name) for name in step.groups}
        return self._measure(batches, step.improvements, due, step.forgotten, follows_rule=report.follows_rule)

    def _measure(
        self,
        batches: Batches,
        promised: Mapping[str, Tensor],
        due: Mapping[str, Tensor],
        forgotten: Sequence[str],
        steps: int = 1,
        *,
        follows_rule: bool = True,
    ) -> Outcome:
        """Run the batches of all groups again; one read of the host."""
        losses = batches.run_again()
        rows = [
            torch.stack((before, promised[name].to(before), due[name].to(before), after))
            for name, (before, after) in losses.items()
        ]
        numbers = self._trainer.strategy.reduce(torch.stack(rows), reduce_op="mean").tolist()
        outcomes = {}
        for name, (loss, promise, least, new) in zip(losses, numbers, strict=True):
            is_forgotten = name in forgotten
            change = new - loss if is_forgotten else loss - new
            outcomes[name] = GroupOutcome(is_forgotten, loss, promise, least, change, follows_rule, steps)
        return Outcome(outcomes)

    def _write(self, outcome: Outcome, verdict: str, together: int = 1) -> None:
        if self._ledger is None:
            return
        row = {"step": self._trainer.global_step, "try": max(self._tries, 1), "region": self.region}
        steps = {"steps": together} if self._settings.every == "auto" else {}
        self._ledger.write({**row, **steps, **outcome.numbers(), "verdict": verdict})


_STATE = ("region", "verified", "kept", "retried", "dropped", "together", "_windows")
