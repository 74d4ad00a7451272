"""The groups of a fit besides retain: what is forgotten, and what is protected."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks._approach import Approach
from hamu_lightning.callbacks._checks import HAMUMisconfigurationError
from hamu_lightning.callbacks._forget_pass import ForgetPass
from hamu_lightning.callbacks._streams import ForgetStream, count_shared_samples
from hamu_lightning.randomness import RandomStream
from hamu_lightning.rules import Rule

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from hamu_lightning.callbacks._guard import ModuleGuard
    from hamu_lightning.optim import HAMUOptimizer


class Group:
    """One group: where its batches come from, its passes through the module, and its losses.

    Args:
        name: Its name in the rule.
        trainer: The trainer.
        optimizer: Where the gradient goes.
        seed: Seed of the group's own random state.
        guard: Keeps the module as it was.

    Attributes:
        run: Runs its batches through the module without a trace.
        approach: The way of its loss to a target; None without one.
        is_done: Whether it has left the problem.
        passes: How many of its batches have gone through the module.
        losses: Of the present window, 0-d each.
    """

    def __init__(self, name: str, trainer: Trainer, optimizer: HAMUOptimizer, seed: int, guard: ModuleGuard) -> None:
        self.name = name
        # By name: a request that is added later leaves the random numbers of the others alone.
        own = () if optimizer.rule.groups == ("retain", name) else (zlib.crc32(name.encode()),)
        self._random = RandomStream(seed, _compat.data_rank(trainer), *own)
        self.run = ForgetPass(trainer, optimizer, self._random, partial(optimizer.group, name), guard)
        self.approach: Approach | None = None
        self.is_done, self.passes = False, 0
        self.losses: list[Tensor] = []

    def read(self, loader: Iterable[Any], state: Mapping[str, Any]) -> None:
        """Take batches from this loader, from where `state` left off."""
        self.run.stream = ForgetStream(loader, self._random)
        if "stream" in state:
            self.run.stream.load_state_dict(state["stream"])

    def run_batch(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any) -> Tensor:
        """Run one batch, and return its loss."""
        loss = self.run.run(step, args, kwargs, batch)
        self.passes += 1
        self.losses.append(loss)
        if self.approach is not None:
            self.approach.observe(loss)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, and the counts."""
        stream = {} if self.run.stream is None else {"stream": self.run.stream.state_dict()}
        return {**stream, "passes": self.passes, "is_done": self.is_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` returned; the stream is set by `read`."""
        self.passes, self.is_done = state.get("passes", 0), state.get("is_done", False)
        self._random.draw = self.passes


def name_sources(rule: Rule, forget: Any, protect: Mapping[str, Any]) -> dict[str, Any]:
    """The data of each group by name, in the order of the rule.

    Raises:
        HAMUMisconfigurationError: If the rule and the data have different groups.
    """
    names = rule.groups[1:]
    if not isinstance(forget, Mapping) and names == ("forget",) and not protect:
        return {"forget": forget}
    if not isinstance(forget, Mapping) and forget is not None:
        raise HAMUMisconfigurationError(
            f"Expected `forget` to name its groups, for a rule with the groups {names}, but got "
            f"{type(forget).__name__}. Pass HAMUCallback(forget={{name: loader, ...}}, protect={{name: loader, ...}})."
        )
    given = {**protect, **(forget or {})}
    if forget is None and not protect:
        return dict.fromkeys(names)  # the training loader brings them
    unknown, missing = [n for n in given if n not in names], [n for n in names if n not in given]
    if unknown or missing:
        cure = "Give each group to forget a quota and each protected one a floor: FeasibleDirection(quota, floor)."
        if names == ("forget",):
            cure = (
                "Several loaders become one by CombinedLoader(loaders, 'max_size_cycle'); several groups need a rule "
                "for them: FeasibleDirection(quota={name: ...}, floor={name: ...})."
            )
        raise HAMUMisconfigurationError(
            f"Expected data for the rule's groups {names}, but there is none for {missing}, and the rule knows nothing "
            f"of {unknown}. {cure}"
        )
    return {name: given[name] for name in names}


def check_disjoint(forgotten: Mapping[str, Any], protected: Mapping[str, Any]) -> None:
    """Raise where samples are both to be forgotten and protected, as far as it can be seen."""
    for name, loader in forgotten.items():
        for other, kept in protected.items():
            shared = count_shared_samples(loader, kept)
            if shared:
                raise HAMUMisconfigurationError(
                    f"Expected {name!r} and {other!r} to have no sample in common, but they share {shared} of one "
                    "Dataset: what is to be forgotten cannot be protected. Take them out of one of the two."
                )


def take_turns(groups: list[Group], per_step: int | None, turn: int) -> list[Group]:
    """The groups whose turn it is: `per_step` of them, one after the other; None for all."""
    if per_step is None or per_step >= len(groups):
        return groups
    start = turn * per_step % len(groups)
    chosen = {g.name for g in islice([*groups, *groups], start, start + per_step)}
    return [g for g in groups if g.name in chosen]
