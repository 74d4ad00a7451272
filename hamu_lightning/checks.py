"""Checks of arguments: each names the argument, what is expected of it, and what was given."""

from __future__ import annotations

import math

from hamu_lightning.errors import HAMUValueError

__all__ = ["check_choice", "check_positive"]


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless a value is one of the choices.

    Args:
        name: The argument's name, as its caller knows it.
        value: What was given.
        choices: What may be given.

    Raises:
        HAMUValueError: If it is none of them.

    Example:
        >>> check_choice("allocation", "fair", ("uniform", "optimal"))
        Traceback (most recent call last):
        ...
        hamu_lightning.errors.HAMUValueError: Expected `allocation` to be one of 'uniform', 'optimal', but got 'fair'.
    """
    if value not in choices:
        raise HAMUValueError(f"Expected `{name}` to be one of {', '.join(map(repr, choices))}, but got {value!r}.")


def check_positive(name: str, value: float) -> None:
    """Raise unless a number is positive and finite.

    Args:
        name: The argument's name, as its caller knows it.
        value: What was given.

    Raises:
        HAMUValueError: If it is not.

    Example:
        >>> check_positive("radius", -1.0)
        Traceback (most recent call last):
        ...
        hamu_lightning.errors.HAMUValueError: Expected `radius` to be positive, but got -1.0.
    """
    if not (math.isfinite(value) and value > 0):
        raise HAMUValueError(f"Expected `{name}` to be positive, but got {value}.")
