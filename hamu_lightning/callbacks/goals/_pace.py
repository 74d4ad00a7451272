"""When to measure a level again that no promise foretells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Steps between two measurements at most; and so many times as fast as in the last ones a level may rise.
_MOST, _FASTER = 10, 3.0


class Pace:
    """Measures after one step, then after twice as many as before, and sooner where the level could come to its end.

    Example:
        >>> pace, due = Pace(), []
        >>> for taken in range(40):
        ...     if pace.is_due(taken):
        ...         due.append(taken)
        ...         pace.mark(0.1 * taken, 4.0, taken)
        >>> due
        [0, 1, 3, 7, 15, 23, 28, 31, 34, 35, 36, 37, 38, 39]
    """

    def __init__(self) -> None:
        self._level, self._at, self._next = 0.0, -1, 0

    def is_due(self, taken: int) -> bool:
        """Whether to measure after so many steps."""
        return taken >= self._next or taken < self._at

    def mark(self, level: float, end: float, taken: int) -> None:
        """Take in what was measured, and where it should end; plan the next measurement."""
        steps = max(taken - self._at, 1)
        most: float = 1 if self._at < 0 else min(2 * steps, _MOST)
        speed = (level - self._level) / steps
        if speed > 0:
            most = min(most, (end - level) / (_FASTER * speed))
        self._level, self._at, self._next = level, taken, taken + max(1, int(most))

    def restart(self) -> None:
        """The weights went back: measure at once."""
        self._at, self._next = -1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        vars(self).update(state)
