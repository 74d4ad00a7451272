"""Watches over the retain data of a fit, and goes back to where it was within bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from hamu_lightning.callbacks import _compat_loaders
from hamu_lightning.callbacks.goals._excerpts import choose_place, open_excerpt
from hamu_lightning.callbacks.goals._kept_weights import KeptWeights
from hamu_lightning.callbacks.goals._meter import Meter
from hamu_lightning.callbacks.goals._retain_guard import Reading, RetainGuard
from hamu_lightning.callbacks.passes import ForgetPass, MeasuringLoader, count_samples
from hamu_lightning.checks import describe
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.wording import count

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from hamu_lightning.optim import HAMUOptimizer

RETAIN = "retain"


class RetainWatch:
    """Measures the excerpts of a `RetainGuard`, keeps the last weights within its bounds, and goes back to them.

    Args:
        trainer: The trainer, with its loaders set up.
        optimizer: The optimizer.
        settings: What the user asked for.
        run: What runs batches through the module without a trace.
        sources: The retain loader by the name of `RETAIN`, and those of held-out data by what they are called.
        seed: Of the draw of the excerpts.
        state: What `state_dict` returned in the run that this one continues.

    Attributes:
        absent: Why there is no guard, in words; None while there is one.
        message: Why the fit is to end, in words; None while it goes on.
        limit: How large the trust region may be, in those of the rule.
        returns: How often it went back.
        beginning: The names in the state that say where the run began.
    """

    beginning = ("settings", "places", "start")

    def __init__(
        self,
        trainer: Trainer,
        optimizer: HAMUOptimizer,
        settings: RetainGuard,
        run: ForgetPass,
        sources: Mapping[str, Any],
        seed: int,
        state: Mapping[str, Any],
    ) -> None:
        self._trainer, self._optimizer, self._settings = trainer, optimizer, settings
        self._meter, self._kept = Meter(trainer, run), KeptWeights(optimizer)
        self._sources, self._seed = sources, seed
        self._excerpts: dict[str, MeasuringLoader] = {}
        self._places: dict[str, Any] = {}
        self._start: dict[str, Reading] = {}
        self._now: dict[str, Reading] = {}
        self._good: dict[str, Reading] = {}
        self._steps = 0
        self._has_moved = True
        self._largest, self._is_over = 0.0, False
        self._last_step: tuple[Any, ...] = ()
        self.absent: str | None = None
        self.message: str | None = None
        self.limit, self.returns = 1.0, 0
        self._load(state)

    def look(self, *step: Any, is_due: bool = False) -> bool:
        """Measure what has to be measured before a step; reads the host where it does.

        Args:
            step: What runs a retain batch, and its arguments.
            is_due: Whether to measure in any case.

        Returns:
            Whether the weights went back.
        """
        self._last_step = (step[0], (None, *step[1][1:]), step[2])
        is_regular = self._steps % self._settings.every == 0 or not self._kept.are_there
        if self.message is not None or not (is_due or is_regular) or not self._open(step[1][0]):
            return False
        if not self._start:
            self._measure_first()
        elif is_due or self._has_moved or not self._now:
            self._measure(self._held)
        harm = None if self.absent is not None else self._explain()
        if self.absent is None and harm is None:
            self._keep()
        return harm is not None and self._go_back(harm)

    @property
    def _held(self) -> list[str]:
        """The names of the excerpts that are to stay within bounds."""
        return [name for name in self._excerpts if name == RETAIN or self._settings.holdout]

    def note_step(self, *, was_combined: bool) -> None:
        """Count a step."""
        self._steps += was_combined
        self._has_moved = True
        self._largest = max(self._largest, self._optimizer.region)

    def conclude(self) -> bool:
        """Measure at the end of the fit, at the weights that it leaves; return whether they went back."""
        if self._is_over or not self._start or not self._last_step or not self._open():
            return False
        self._is_over, goes_back = True, False
        if self._has_moved:
            self._measure(self._held)
            harm = self._explain()
            goes_back = self._kept.are_there and harm is not None
            if goes_back:
                self._restore(f"{harm} in the last steps")
        self._measure(name for name in self._excerpts if name not in self._held)
        self._kept.release()
        return goes_back

    def close(self) -> None:
        """Let the workers go that read for measurements."""
        for excerpt in self._excerpts.values():
            excerpt.close()

    def numbers(self) -> dict[str, float]:
        """What is logged beside the step: what was measured last."""
        found = {f"{name}_level": reading.loss for name, reading in self._now.items()}
        if RETAIN in self._now and not math.isnan(self._now[RETAIN].accuracy):
            found["retain_accuracy"] = self._now[RETAIN].accuracy
        return found

    def describe(self) -> str:
        """What was measured at the start and at the end, in words, and how often it went back."""
        if self.absent is not None:
            return f"No guard over the retain data: {self.absent}"
        told = [
            f"{_word(name)} {start.describe()} -> {self._now[name].describe()}{_describe_samples(start.samples)}"
            for name, start in self._start.items()
            if name in self._now
        ]
        if not told:
            return "The retain data were never measured."
        back = f"; went back {_times(self.returns)}" if self.returns else ""
        region = f", the trust region is at most {self.limit:.3g} times the rule's" if self.limit < 1 else ""
        return f"In evaluation mode: {'; '.join(told)}{back}{region}."

    def state_dict(self) -> dict[str, Any]:
        """Return the places of the excerpts, what was measured, and the weights to go back to, in plain values."""
        readings = {"start": self._start, "now": self._now, "good": self._good}
        return {
            "settings": repr(self._settings),
            "places": self._places,
            **{name: {n: list(astuple(r)) for n, r in found.items()} for name, found in readings.items()},
            **{name: getattr(self, name) for name in _STATE},
            "kept": self._kept.state_dict(),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        """Go on where a run under the same settings left off; of one that has ended, only from where it began."""
        if state.get("settings") != repr(self._settings):
            return
        self._places = dict(state["places"])
        self._start = {name: Reading(*numbers) for name, numbers in state["start"].items()}
        if "kept" not in state:
            return
        for name in ("now", "good"):
            setattr(self, f"_{name}", {n: Reading(*numbers) for n, numbers in state[name].items()})
        for name in _STATE:
            setattr(self, name, state[name])
        self._kept.load_state_dict(state["kept"])
        self._optimizer.region_limit = self.limit

    def _open(self, batch: Any = None) -> bool:
        """Open the excerpts at the first look, which needs a batch to go by; return whether there is a guard."""
        if self._excerpts or self.absent is not None:
            return self.absent is None
        for name, loader in self._sources.items():
            try:
                self._excerpts[name] = self._open_one(name, loader, batch)
            except HAMUValueError as error:
                if name == RETAIN or self._settings.holdout:
                    self._give_up(str(error))
        return self.absent is None

    def _open_one(self, name: str, loader: Any, batch: Any) -> MeasuringLoader:
        strategy = self._trainer.strategy
        if name not in self._places:
            chosen = choose_place(loader, self._settings.samples, self._seed, count_samples(batch))
            self._places[name] = strategy.broadcast(chosen)
        if "positions" not in self._places[name] and _compat_loaders.data_parallel_group(self._trainer) is not None:
            raise HAMUValueError(
                f"Expected a DataLoader over a map-style Dataset, with a batch size, to read an excerpt of the {name} "
                f"data that all processes share, but got {describe(loader)}."
            )
        return open_excerpt(loader, self._places[name])

    def _give_up(self, why: str) -> None:
        self.absent = why
        rank_zero_info(f"HAMU: {self.describe()}")

    def _measure(self, names: Iterable[str]) -> None:
        for name in names:
            self._now[name] = self._meter.measure(self._excerpts[name], *self._last_step)
        self._has_moved = False

    def _measure_first(self) -> None:
        """Before anything has moved: what fails here is no fault of unlearning."""
        try:
            self._measure(self._excerpts)
        except Exception as error:
            self._give_up(f"measuring them in evaluation mode raised {type(error).__name__}: {error}")
            return
        if not all(math.isfinite(reading.loss) for reading in self._now.values()):
            self._give_up("their loss in evaluation mode is not finite before the first step")
        else:
            self._start = dict(self._now)

    def _explain(self) -> str | None:
        """How the last readings are out of bounds; None where they are within them."""
        found = (
            self._settings.explain(_word(name), self._start[name], self._now[name])
            for name in self._held
            if name in self._start
        )
        return next((why for why in found if why is not None), None)

    def _keep(self) -> None:
        self._kept.keep()
        self._good, self._largest = dict(self._now), 0.0

    def _restore(self, harm: str) -> None:
        rank_zero_info(f"HAMU: at step {self._trainer.global_step} {harm}: the model goes back to where it was before.")
        self.returns += 1
        self._kept.restore()
        self._now, self._has_moved = dict(self._good), False

    def _go_back(self, harm: str) -> bool:
        """Go back to the last readings within bounds, and on in a smaller region; or end the fit there."""
        if not self._kept.are_there:
            self.message = f"{harm}, and there is no earlier step to go back to."
            return False
        self._restore(harm)
        self.limit, self._largest = self._settings.shrink * min(self.limit, self._largest or self.limit), 0.0
        self._optimizer.region_limit = self.limit
        if self.returns >= self._settings.max_returns:
            self.message = (
                f"{harm}, in the end in a trust region of {self.limit / self._settings.shrink:.3g} times the rule's. "
                f"The model went back {_times(self.returns)}, and stays where it was within bounds. More retain data "
                "in each step, a nearer target, or RetainGuard(...) with other bounds let it go further."
            )
        return True


_STATE = ("limit", "returns", "message", "_steps", "_has_moved", "_largest")


def _word(name: str) -> str:
    return name.replace("_", " ").replace("holdout", "held-out")


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _describe_samples(samples: float) -> str:
    return "" if math.isnan(samples) else f" ({count(round(samples), 'sample')})"
