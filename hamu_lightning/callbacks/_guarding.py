"""The guard over the retain data, among the other parts of a fit."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hamu_lightning.callbacks._group import Group
from hamu_lightning.callbacks._groups import Groups
from hamu_lightning.callbacks.goals import CEILINGS, RETAIN, Reader, RetainWatch, Stopper, StopReason, Target
from hamu_lightning.callbacks.passes import ForgetPass
from hamu_lightning.randomness import RandomStream

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from hamu_lightning.callbacks._settings import FitSettings
    from hamu_lightning.optim import HAMUOptimizer


class Guarding:
    """Lets a `RetainWatch` look where it has to, and lets the others know where it went back.

    Args:
        trainer: The trainer, with its loaders set up.
        optimizer: The optimizer.
        settings: What the user asked for; without a guard nothing happens here.
        groups: What is forgotten and what is protected.
        stopper: Ends the fit.
        state: What `state_dict` returned in the run that this one continues.
    """

    def __init__(
        self,
        trainer: Trainer,
        optimizer: HAMUOptimizer,
        settings: FitSettings,
        groups: Groups,
        stopper: Stopper,
        state: Mapping[str, Any],
    ) -> None:
        self._groups, self._stopper = groups, stopper
        self._watch: RetainWatch | None = None
        if settings.guard is not None:
            random = RandomStream(settings.seed, 0, zlib.crc32(b"retain guard"))
            run = ForgetPass(trainer, optimizer, random, nullcontext, groups.guard)
            sources = find_sources(trainer, optimizer)
            self._watch = RetainWatch(trainer, optimizer, settings.guard, run, sources, settings.seed, state)

    @property
    def is_due(self) -> bool:
        """Whether something is to be measured before the next step."""
        return self._groups.are_due or (self._watch is not None and self._watch.is_due)

    def open_window(
        self, steps: Mapping[str, Callable[..., Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Group]:
        """Measure what has to be measured before a step, and choose its groups; return those that leave or return."""
        groups, retain_step = self._groups, steps[RETAIN]
        self._look(retain_step, args, kwargs)
        moved = groups.open_window(steps, args, kwargs)
        # Nothing counts as reached that has cost too much.
        if (groups.are_all_reached or groups.are_lost) and self._look(retain_step, args, kwargs, is_due=True):
            moved += groups.open_window(steps, args, kwargs)
        return moved

    def close_window(self, *, was_combined: bool) -> None:
        """Say that the optimizer has stepped; not where the fit is over already, or only to go back."""
        if self._watch is not None and self._stopper.reason in (None, *CEILINGS):
            self._watch.note_step(was_combined=was_combined)

    def conclude(self) -> None:
        """Measure at the end of the fit, and go back where it has to; more than once does nothing."""
        if self._watch is not None and self._watch.conclude():
            self._groups.start_over()

    def _look(self, *step: Any, is_due: bool = False) -> bool:
        if self._watch is None:
            return False
        went_back = self._watch.look(*step, is_due=is_due)
        if went_back:
            self._groups.start_over()
            self._stopper.start_over()
        if self._watch.message is not None:
            self._stopper.stop(StopReason.RETAIN_GUARD, self._watch.message)
        return went_back

    def numbers(self) -> dict[str, Tensor]:
        """What is logged beside the step."""
        found = {} if self._watch is None else self._watch.numbers()
        return {name: torch.tensor(number, dtype=torch.float64) for name, number in found.items()}

    def describe(self) -> str:
        """What was measured, in words."""
        return "" if self._watch is None else self._watch.describe()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the watch."""
        return {} if self._watch is None else self._watch.state_dict()

    @property
    def has_gone_back(self) -> bool:
        """Whether weights went back to an earlier step."""
        return self._watch is not None and self._watch.returns > 0

    def close(self) -> None:
        """Let the workers go that read for measurements."""
        if self._watch is not None:
            self._watch.close()


def find_sources(trainer: Trainer, optimizer: HAMUOptimizer) -> dict[str, Any]:
    """The retain loader, and those of the held-out data of targets."""
    reader = Reader(trainer)
    sources: dict[str, Any] = {RETAIN: reader.find_retain()}
    known: list[Any] = []
    quotas = optimizer.rule.target_quotas
    for group, quota in quotas.items():
        target = quota.target
        if isinstance(target, Target) and target.has_held_out and not any(target.data is data for data in known):
            known.append(target.data)
            name = "holdout" if len(quotas) == 1 else f"{group}_holdout"
            sources[name] = reader.find(target.data)
    return sources
