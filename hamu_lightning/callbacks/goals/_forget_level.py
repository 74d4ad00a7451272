"""The level of what is to be forgotten, measured where it has to be, and on as much of it as it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hamu_lightning.callbacks.goals._gauge import Gauge
from hamu_lightning.callbacks.goals._pace import Pace
from hamu_lightning.callbacks.goals._reading import Excerpt
from hamu_lightning.callbacks.goals._targets import REACHED
from hamu_lightning.callbacks.goals._trail import Trail
from hamu_lightning.callbacks.passes import ForgetPass, MeasuringLoader, spread
from hamu_lightning.gramian import widest_float
from hamu_lightning.optim import Aim

# The level is measured every so many steps, and where so many times its rise since could have come to the end.
MEASURE_EVERY, _SAFETY = 10, 2.0
# So many batches of a larger set stand for it on the way, at equal distances in a pass; and so many of these say how
# much the losses have changed.
_MOST_BATCHES, _FEW = 32, 4
# The mean of a few changes is known to so many of its standard errors.
_ERRORS = 2.0


class ForgetLevel:
    """Measures the mean loss of a set, each time on the fewest of its batches that say whether it is short of its end.

    A first reading of 32 batches (all of a smaller set) is the base. From then on four of them say by how much losses
    have changed since, which is nearly the same in all batches, whatever their height:

        level = mean of the base + mean change of the four

    Where that is within two standard errors of a bound, the whole base is read again, and what is more than the base
    where that has come there too.

    Args:
        gauge: What measures.
        forget_pass: What runs batches; it knows the losses of those that it ran last.
        batches: The set.
        state: What `state_dict` returned in the run that this one continues.

    Attributes:
        value: The level of all of the set, where it was measured last; None before.
        trail: The losses of training batches since.
    """

    def __init__(
        self, gauge: Gauge, forget_pass: ForgetPass, batches: MeasuringLoader, state: Mapping[str, Any]
    ) -> None:
        self._gauge, self._forget_pass, self._batches = gauge, forget_pass, batches
        n = batches.length
        self._numbers = None if n is None else [*spread(n, _MOST_BATCHES)]
        self.is_small = n is None or n <= _MOST_BATCHES
        self._base: tuple[Tensor, Tensor] | None = None
        self.trail, self._pace = Trail(), Pace()
        if state:
            self._base = state["base"] and (state["base"][0], state["base"][1])
            self.trail.load_state_dict(state["trail"])
            self._pace.load_state_dict(state["pace"])
        self.value: Tensor | None = None

    def is_due(self, aim: Aim, end: Tensor) -> bool:
        """Whether to measure: every so many steps, and where it could have come to the end since it was measured.

        Args:
            aim: The level as it is followed by what steps promise.
            end: The target, 0-d.
        """
        then, seen = self.trail.level, self.trail.estimate
        if aim.level is None or then is None or seen is None or aim.taken % MEASURE_EVERY == 0:
            return True
        if aim.exchange is not None:  # promises are in another unit
            return self._pace.is_due(aim.taken)
        rise = torch.maximum((aim.level - then).clamp(min=0), (seen - then).to(aim.level))
        return not bool(then + _SAFETY * rise < REACHED * end)

    def mark(self, level: Tensor, end: Tensor, taken: int) -> None:
        """Note what was measured after so many steps."""
        self.trail.mark(level)
        self._pace.mark(float(level), float(end), taken)

    def start_over(self, level: Tensor | None = None) -> None:
        """The weights have gone back, to where this level was measured."""
        if level is None:
            self.trail, self.value = Trail(), None
        else:
            self.trail.mark(level)
        self._pace.restart()

    def measure(self, bound: Tensor, *step: Any) -> Tensor:
        """Measure it at the present weights; `value` is None afterwards unless all of it was read.

        Args:
            bound: All of it is read where it seems to have come to this level, 0-d.
            step: What runs a batch, and the arguments of the retain batch.
        """
        self.value = None
        few = self._choose_few()
        if few is not None:
            level, error = self._read_few(few, *step)
            if bool(level + _ERRORS * error < bound):
                return level
        level = self._read(self._numbers, *step)
        if self.is_small:
            self.value = level
        elif not bool(level < bound):
            level = self.measure_all(*step)
        return level

    def measure_all(self, *step: Any) -> Tensor:
        """Measure it on all of the set."""
        self.value = self._gauge.mean_loss(self._batches, *step)
        return self.value

    def close(self) -> None:
        """Let the workers go that read."""
        self._batches.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what was read and seen, in tensors and numbers."""
        base = None if self._base is None else [*self._base]
        return {"base": base, "trail": self.trail.state_dict(), "pace": self._pace.state_dict()}

    def _choose_few(self) -> list[int] | None:
        """The places in the base of a few batches; None where these are not fewer."""
        if self._base is None or self._numbers is None or len(self._numbers) < 2 * _FEW:
            return None
        return [*spread(len(self._numbers), _FEW)] if len(self._base[0]) == len(self._numbers) else None

    def _read(self, numbers: Sequence[int] | None, *step: Any) -> Tensor:
        """Read the base."""
        level = self._gauge.mean_loss(Excerpt(self._batches, numbers), *step)
        self._base = self._forget_pass.batch_losses
        return level

    def _read_few(self, few: list[int], *step: Any) -> tuple[Tensor, Tensor]:
        """The level by a few batches, and its error."""
        assert self._base is not None and self._numbers is not None
        base, weights = self._base
        numbers = [self._numbers[place] for place in few]

        def measure(module: Any, mean_loss: Callable[[Iterable[Any]], Tensor], batch: Any) -> Tensor:
            mean_loss(Excerpt(self._batches, numbers))
            assert self._forget_pass.batch_losses is not None
            now, own = self._forget_pass.batch_losses
            if len(now) != len(few):  # some gave no loss
                return torch.full((2,), torch.inf)
            changes = (now - base[few].to(now)).to(widest_float(now.device))
            mean = base @ weights / weights.sum()
            return torch.stack(
                (mean.to(changes) + changes @ own.to(changes) / own.sum(), changes.std() / len(few) ** 0.5)
            )

        level, error = self._gauge.measure_pair(measure, *step)
        return level, error
