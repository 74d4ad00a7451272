"""What a step promised, what it did, and whether that is what it promised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

# A loss is known to about this share of itself: a step that promises less cannot be judged.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class GroupOutcome:
    """What a step promised for the loss of one group, and what it did, in loss units.

    Improvements count positive where they serve: a loss to forget rises, any other one falls. `due` is what the actual
    change of the weights should do, to first order: the promise, with plain SGD. `loss` is from before the step. Where
    the weights `follow` the rule's own step, only rounding can make less of it. Of several `steps` that are judged
    together everything is the sum, but for `loss`, from before the first of them.
    """

    is_forgotten: bool
    loss: float
    promised: float
    due: float
    measured: float
    follow: bool = False
    steps: int = 1

    def is_harmless(self, slack: float) -> bool:
        """Whether the loss went no further than what was promised allows for; NaN is harm."""
        if not self.is_forgotten:
            return -self.measured <= 1.5 * max(-self.promised, 0.0) + 0.1 * self.steps * abs(self.loss) + slack
        return self.measured <= 3 * max(self.promised, 0.0) + 0.5 * self.steps * abs(self.loss) + slack

    def is_kept(self, tolerance: float, slack: float) -> bool:
        """Whether the step kept its promise to the group; see `VerifySteps`. NaN breaks it."""
        if not self.is_forgotten or not self.is_harmless(slack):
            return self.is_harmless(slack)
        if self.follow and self.promised > 0 and self.due < tolerance * self.promised:
            return False  # the weights are too coarse for the step
        due = min(self.promised, self.due)
        # Past a target less than nothing is due: the loss may fall by that much.
        return due * (tolerance if due > 0 else 2 - tolerance) - slack <= self.measured


@dataclass(frozen=True)
class Outcome:
    """What a step promised and what it did, for each group by name."""

    groups: Mapping[str, GroupOutcome]

    @property
    def _slack(self) -> float:
        return _ROUNDING * sum(abs(group.loss) for group in self.groups.values())

    def is_kept(self, tolerance: float) -> bool:
        """Whether the step kept all its promises."""
        return all(group.is_kept(tolerance, self._slack) for group in self.groups.values())

    def is_harmless(self) -> bool:
        """Whether no loss went further than what was promised allows for."""
        return all(group.is_harmless(self._slack) for group in self.groups.values())

    def numbers(self) -> dict[str, float]:
        """The losses, the promises, what was due of them, and what was measured, by name."""
        groups = self.groups
        return {
            **{f"{name}_loss": group.loss for name, group in groups.items()},
            **{f"promised_{name}": group.promised for name, group in groups.items()},
            **{f"due_{name}": group.due for name, group in groups.items() if group.is_forgotten},
            **{f"measured_{name}": group.measured for name, group in groups.items()},
        }
