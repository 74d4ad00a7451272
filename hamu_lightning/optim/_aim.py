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
    """

    target: Tensor | None = None
    steps: int | None = None
    window: int = 5
    level: Tensor | None = None
    observed: int = 0
    taken: int = 0

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
        return quota.resolve(self.level, place, step=self.taken, steps=steps)

    def advance(self, promised: Tensor) -> None:
        """Count a step, and expect what it promises."""
        assert self.level is not None
        self.taken += 1
        self.level = self.level + torch.where(promised.isfinite(), promised, 0).to(self.level)

    def state_dict(self) -> dict[str, Any]:
        """Return the level, the target, the counts and the plan."""
        counts = {"observed": self.observed, "taken": self.taken, "steps": self.steps}
        return {"level": self.level, "target": self.target, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        self.level, self.observed, self.taken = state["level"], state["observed"], state["taken"]
        self.target, self.steps = state["target"], state.get("steps")
