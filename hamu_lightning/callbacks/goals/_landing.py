"""The end of the way to a target: weights to go back to where a step went too far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hamu_lightning.callbacks.goals._kept_weights import KeptWeights
from hamu_lightning.callbacks.goals._targets import REACHED
from hamu_lightning.optim import HAMUOptimizer

# From so many times the target on, advice is due.
_FAR_BEYOND = 1.5


class Landing:
    """Keeps the weights that were measured last near a target, with their level.

    Args:
        optimizer: The optimizer.

    Attributes:
        level: The level at the weights that are kept, 0-d; None where there are none.
        is_known: Whether it is that of the whole set.
    """

    def __init__(self, optimizer: HAMUOptimizer) -> None:
        self._kept = KeptWeights(optimizer)
        self.level: Tensor | None = None
        self.is_known = False

    def keep(self, level: Tensor | None, *, is_known: bool = False) -> None:
        """Keep the present weights, with their level; None lets go of those that are kept."""
        self.level, self.is_known = level, is_known
        if level is None:
            self._kept.release()
        else:
            self._kept.keep()

    def release(self) -> None:
        """Let go of what is kept."""
        self.keep(None)

    def go_back(self, level: Tensor, target: Tensor, *, in_any_case: bool) -> Tensor | None:
        """Go back to the weights that are kept if they were nearer to the target, and return their level.

        Args:
            level: The level at the present weights, 0-d.
            target: The target, 0-d.
            in_any_case: Whether to go back also where they were not.
        """
        before = self.level
        if before is None or not (in_any_case or bool(level - target > target - before)):
            return None
        self._kept.restore()
        return before

    def state_dict(self) -> dict[str, Any]:
        """Return the weights that are kept and their level; empty where there are none."""
        kept = self._kept.state_dict()
        return {"kept": kept, "kept_level": self.level, "kept_is_known": self.is_known} if kept else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` returned, among other things."""
        self._kept.load_state_dict(state.get("kept", {}))
        self.level, self.is_known = state.get("kept_level"), state.get("kept_is_known", False)


def tell_distance(level: float, target: float, *, may_be_short: bool) -> str:
    """What is to be said where a fit has ended far from its target, with the cure; empty elsewhere."""
    if level > _FAR_BEYOND * target:
        return ", far beyond it: verified steps or a smaller radius prevent that"
    if level < REACHED * target and not may_be_short:
        return ", short of it: the next step went further beyond; verified steps or a smaller radius come nearer"
    return ""
