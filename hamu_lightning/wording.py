"""Counts in words."""

from __future__ import annotations

__all__ = ["count"]


def count(number: int, one: str, more: str | None = None) -> str:
    """Return a number with its noun, or whatever else depends on it.

    Args:
        number: How many.
        one: What follows 1.
        more: What follows every other number. Default: `one` with an "s".

    Example:
        >>> count(1, "step"), count(0, "step"), count(2, "was", "were")
        ('1 step', '0 steps', '2 were')
    """
    return f"{number} {one if number == 1 else more or one + 's'}"
