"""Where the forget loss is, where it should go, and what the next step is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hamu_lightning.checks import describe
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.gramian import widest_float
from hamu_lightning.rules import TargetQuota


class Exchange:
    """What the level gains where something else is raised: measured, in units of the level for each unit of that.

    Nothing is read on the host.

    Attributes:
        rate: 0-d, as it was between the last two measurements; None before there are two.
    """

    def __init__(self) -> None:
        self.rate: Tensor | None = None
        self._level: Tensor | None = None
        self._promised: Tensor | None = None

    def mark(self, level: Tensor, *, learns: bool = True) -> None:
        """Take in a level that was measured; one of weights that were put back teaches nothing."""
        if learns and self._level is not None and self._promised is not None:
            rate = (level - self._level) / self._promised.to(level)
            # Steps that promised nothing say nothing.
            self.rate = torch.where(rate.isfinite(), rate, 0 * level if self.rate is None else self.rate)
        self._level, self._promised = level, None

    def promise(self, raised: Tensor) -> Tensor:
        """Note what a step promises, and return what the level gains by it; 0 where that is not known."""
        self._promised = raised if self._promised is None else self._promised + raised
        return self.worth(raised)

    def worth(self, raised: Tensor) -> Tensor:
        """What the level gains where so much is raised, by the last rate; 0 where that is not known, or below 0."""
        return torch.zeros_like(raised) if self.rate is None else raised * self.rate.clamp(min=0).to(raised)

    def ask(self, gain: Tensor) -> Tensor:
        """What has to be raised for a gain of the level; without bound where nobody knows, 0 for a loss."""
        unknown = torch.where(gain > 0, torch.inf, 0.0).to(gain)
        return unknown if self.rate is None else torch.where(self.rate.to(gain) > 0, gain / self.rate.to(gain), unknown)

    def state_dict(self) -> dict[str, Any]:
        """Return the rate, and what the next one is measured from, in tensors."""
        return {name: getattr(self, name) for name in ("rate", "_level", "_promised")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        for name in state:
            setattr(self, name, state[name])


@dataclass
class Aim:
    """Follows the forget loss from batch to batch, for a `TargetQuota`. Nothing is read on the host.

    Batches are noisy, and a running mean lags behind a loss that rises. So the level is predicted and corrected: each
    step adds the improvement that it promises, each observed loss pulls the level towards itself, by 1/n for the n-th
    and by 1/window from then on.

    Args:
        target: 0-d, where the loss should end.
        steps: In how many steps.
        window: Over how many batches losses are smoothed.
        level: 0-d, float64, the present forget loss; None before the first observation.
        observed: The number of observations.
        taken: The number of steps.
        exchange: Where the level is of something else than what the steps raise: what it gains by them.
        further: How many times the target the steps go to. Not in the state: whoever sets it knows.
    """

    target: Tensor | None = None
    steps: int | None = None
    window: int = 5
    level: Tensor | None = None
    observed: int = 0
    taken: int = 0
    exchange: Exchange | None = None
    further: float = 1.0

    @property
    def goal(self) -> Tensor | None:
        """Where the steps go: the target, or further; 0-d."""
        return None if self.target is None else self.target * self.further

    def follow(self, *, is_raised: bool) -> None:
        """Say whether the level is of what the steps raise; else what it gains by them is learnt."""
        if is_raised == (self.exchange is not None):
            self.exchange = None if is_raised else Exchange()

    def mark(self, level: Tensor, *, learns: bool = True) -> None:
        """Take in a level that was measured on the set; one of weights that were put back teaches nothing."""
        if self.exchange is not None:
            self.exchange.mark(level, learns=learns and self.level is not None)
        self.level = level

    def observe(self, loss: Tensor) -> None:
        """Take the loss of a forget batch in; one that is not finite says nothing."""
        loss = loss.detach().to(widest_float(loss.device))
        # Before the first finite loss there is no level.
        level = loss if self.level is None else torch.where(self.level.isfinite(), self.level, loss)
        self.observed += 1
        gain = 1 / min(self.observed, self.window)
        self.level = torch.where(loss.isfinite(), level + gain * (loss - level), level)

    def resolve(self, quota: TargetQuota) -> Tensor:
        """Compute what the next step is asked for.

        Raises:
            HAMUStateError: If something to go by is missing.
        """
        target = quota.target if self.target is None else self.target
        steps = quota.steps or self.steps
        if self.level is None:
            raise HAMUStateError(
                "Expected the forget loss before a step with a TargetQuota, but none was observed. "
                "Call `optimizer.aim.observe(forget_loss)` after each forget batch."
            )
        if not isinstance(target, Tensor | float | int) or steps is None:
            raise HAMUStateError(
                f"Expected a number as target and a number of steps, but got {describe(target)} and {steps}. Outside "
                "HAMUCallback give both: TargetQuota(2.3, steps=100)."
            )
        # A number becomes a tensor by a fill on the device: a copy from the host would wait for it.
        place = target.to(self.level) if isinstance(target, Tensor) else self.level.new_full((), target)
        gain = quota.resolve(self.level, place * self.further, step=self.taken, steps=steps)
        return gain if self.exchange is None else self.exchange.ask(gain)

    def advance(self, promised: Tensor) -> None:
        """Count a step, and expect what it promises."""
        assert self.level is not None
        self.taken += 1
        promised = torch.where(promised.isfinite(), promised, 0).to(self.level)
        self.level = self.level + (promised if self.exchange is None else self.exchange.promise(promised))

    def state_dict(self) -> dict[str, Any]:
        """Return the level, the target, the counts and the plan."""
        counts = {"observed": self.observed, "taken": self.taken, "steps": self.steps}
        exchange = {} if self.exchange is None else {"exchange": self.exchange.state_dict()}
        return {"level": self.level, "target": self.target, **counts, **exchange}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        self.level, self.observed, self.taken = state["level"], state["observed"], state["taken"]
        self.target, self.steps = state["target"], state.get("steps")
        if "exchange" in state:
            self.exchange = Exchange()
            self.exchange.load_state_dict(state["exchange"])
