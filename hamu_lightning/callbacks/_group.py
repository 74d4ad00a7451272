"""The groups of a fit besides retain: what is forgotten, and what is protected."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hamu_lightning.callbacks import _compat_loaders
from hamu_lightning.callbacks.goals import Approach, StopCondition, look_at_loss
from hamu_lightning.callbacks.passes import ForgetPass, ForgetStream, unwrap_step
from hamu_lightning.objectives import ModuleLoss
from hamu_lightning.randomness import RandomStream

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from hamu_lightning.callbacks.passes import ModuleGuard
    from hamu_lightning.objectives import Objective
    from hamu_lightning.optim import HAMUOptimizer


class Group:
    """One group: where its batches come from, its passes through the module, and its losses.

    Args:
        name: Its name in the rule.
        trainer: The trainer.
        optimizer: Where the gradient goes.
        seed: Seed of the group's own random state.
        guard: Keeps the module as it was.
        objective: What is differentiated; None for the module's own loss.

    Attributes:
        run: Runs its batches through the module without a trace.
        approach: The way of its loss to a target; None without one.
        is_done: Whether it has left the problem.
        stays: Whether it leaves no more before all do: it has come back once, since the others undid it.
        passes: How many of its batches have gone through the module.
        before: How many of them in the run that this fit continues.
        losses: Of the present window, 0-d each: what conditions to stop on look at.
    """

    def __init__(
        self,
        name: str,
        trainer: Trainer,
        optimizer: HAMUOptimizer,
        seed: int,
        guard: ModuleGuard,
        objective: Objective | None,
    ) -> None:
        self.name, self.objective = name, objective
        # By name: a request that is added later leaves the random numbers of the others alone.
        own = () if optimizer.rule.groups == ("retain", name) else (zlib.crc32(name.encode()),)
        self._random = RandomStream(seed, _compat_loaders.data_rank(trainer), *own)
        self.run = ForgetPass(trainer, optimizer, self._random, partial(optimizer.group, name), guard)
        self.approach: Approach | None = None
        self.is_done, self.passes, self.before = False, 0, 0
        self.stays = self._heeds_loss = False
        self.losses: list[Tensor] = []

    def read(self, loader: Iterable[Any], state: Mapping[str, Any]) -> None:
        """Take batches from this loader, from where `state` left off."""
        self.run.stream = ForgetStream(loader, self._random)
        if "stream" in state:
            self.run.stream.load_state_dict(state["stream"])

    def heed(self, conditions: Iterable[StopCondition]) -> None:
        """Take the module's own loss of each batch for `losses` where a ceiling is for that, and another is raised."""
        if look_at_loss(conditions, "forget") and not isinstance(self.objective, ModuleLoss | None):
            self._heeds_loss = True
            if not self.run.sees_levels:
                self.run.sees_levels, self.run.level_of = True, lambda step: unwrap_step(step)[0]

    def run_batch(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any) -> Tensor:
        """Run one batch, and return its loss."""
        loss = self.run.run(step, args, kwargs, batch)
        self.passes += 1
        self.losses.append(self.run.level if self._heeds_loss and self.run.level is not None else loss)
        if self.approach is not None:
            self.approach.observe(loss)
        return loss

    def look_after(self, *step: Any) -> None:
        """After it has left: measure its loss again, and come back, to stay, where that has fallen below the target."""
        assert self.approach is not None
        self.approach.look_after(*step)
        self.is_done = self.approach.is_reached
        self.stays = not self.is_done

    def describe_unseen(self) -> str:
        """Which batches of a pass never went through the module, in words; empty where all did, or nobody knows."""
        length = None if self.run.stream is None else self.run.stream.length
        if not length or self.passes >= length:
            return ""
        return f"{self.passes} of {length} {self.name} batches were seen, the others never"

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, and the counts."""
        stream = {} if self.run.stream is None else {"stream": self.run.stream.state_dict()}
        approach = {} if self.approach is None else {"approach": self.approach.state_dict()}
        return {**stream, "passes": self.passes, "is_done": self.is_done, "stays": self.stays, **approach}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` returned; the stream is set by `read`. Whether it is done is found out again."""
        self.passes = self.before = state.get("passes", 0)
        self.stays = state.get("stays", False)
        self._random.draw = self.passes


def take_turns(groups: list[Group], per_step: int | None, turn: int) -> list[Group]:
    """The groups whose turn it is: `per_step` of them, one after the other; None for all."""
    if per_step is None or per_step >= len(groups):
        return groups
    start = turn * per_step % len(groups)
    chosen = {g.name for g in islice([*groups, *groups], start, start + per_step)}
    return [g for g in groups if g.name in chosen]
