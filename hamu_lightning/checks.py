"""Checks of arguments: each names the argument, what is expected of it, and what was given.

Numbers are taken as Python's, numpy's, or 0-d tensors, and returned as Python's. True is no number, and text is none.
What was given is told by its type and size: an argument may hold the data that is to be forgotten.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence, Sized
from numbers import Real
from types import FunctionType
from typing import Any, TypeVar

from torch import Tensor

from hamu_lightning.errors import HAMUValueError

__all__ = [
    "check_choice",
    "check_count",
    "check_flag",
    "check_number",
    "check_optional",
    "check_positive",
    "check_seed",
    "check_type",
    "describe",
    "is_iterable",
    "store",
]

_T = TypeVar("_T")
# A word, as settings have them. Anything else that is text may come from a row of data.
_WORD = re.compile(r"[\w.+-]{0,24}")
# Python writes no longer integers by itself.
_LONGEST = 128
_MOST = 2**63 - 1
_YAML = "YAML reads 1e-3 as text, and 1.0e-3 as a number."


def describe(value: object) -> str:
    """Tell what was given in an error message: numbers and single words as they are, else the type and the size.

    Args:
        value: What was given.

    Returns:
        A few words without a row of anybody's data.

    Example:
        >>> import torch
        >>> describe(-1.0), describe("fair"), describe("Jane Doe, born 1980")
        ('-1.0', "'fair'", 'text of 19 characters')
        >>> describe(torch.ones(2, 3)), describe([7, 8])
        ('a Tensor of shape [2, 3] and torch.float32', 'a list of length 2')
    """
    if not isinstance(value, Tensor):
        value = _unwrap(value)
    if value is None or isinstance(value, bool | float | complex):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() <= _LONGEST else f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return repr(value) if _WORD.fullmatch(value) else f"text of {len(value)} characters"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, FunctionType):
        return "a function"
    name = type(value).__name__.replace("ndarray", "array")
    name = f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{name} of shape {list(value.shape)} and {value.dtype}"
    try:
        return f"{name} of length {len(value)}" if isinstance(value, Sized) else name
    except Exception:  # a loader over a dataset without a length has a `len` that raises what it likes
        return name


def check_type(name: str, value: Any, kinds: Any, wanted: str, cure: str = "") -> Any:
    """Raise unless a value is of one of some types.

    Args:
        name: The argument's name, as its caller knows it.
        value: What was given.
        kinds: As for `isinstance`.
        wanted: The types in words.
        cure: What to do, a sentence.

    Returns:
        The value.

    Raises:
        HAMUValueError: If it is of none of them.

    Example:
        >>> check_type("options", [1], dict, "a dict of arguments")
        Traceback (most recent call last):
        ...
        hamu_lightning.errors.HAMUValueError: Expected `options` to be a dict of arguments, but got a list of length 1.
    """
    if not isinstance(value, kinds):
        raise _refusal(name, wanted, value, cure)
    return value


def is_iterable(value: object) -> bool:
    """Whether a loop over a value gives its items; text gives letters, and a 0-d tensor nothing.

    Example:
        >>> is_iterable([1]), is_iterable("infeasible")
        (True, False)
    """
    is_sequence = isinstance(value, Iterable) or hasattr(value, "__getitem__")
    return is_sequence and not isinstance(value, str | bytes | type) and getattr(value, "ndim", 1) != 0


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
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
    if not isinstance(value, str) or value not in choices:
        raise _refusal(name, f"one of {', '.join(map(repr, choices))}", value)


def check_flag(name: str, value: object) -> bool:
    """Raise unless a value is True or False, numpy's included; return it as Python's.

    Args:
        name: The argument's name, as its caller knows it.
        value: What was given.

    Raises:
        HAMUValueError: If it is anything else: what "false" means in a condition is not what it says.

    Example:
        >>> check_flag("exact", "false")
        Traceback (most recent call last):
        ...
        hamu_lightning.errors.HAMUValueError: Expected `exact` to be True or False, but got 'false'.
    """
    flag = _unwrap(value)
    if not isinstance(flag, bool):
        raise _refusal(name, "True or False", value)
    return flag


def check_count(name: str, value: object, *, least: int = 1, most: int = _MOST, cure: str = "") -> int:
    """Raise unless a value is a whole number in a range; return it as Python's.

    Args:
        name: The argument's name, as its caller knows it.
        value: What was given. 2.0 is no whole number: it comes from a division, or from 1e3 for 1000.
        least: The smallest that can be used.
        most: The largest; by default that of 64 bits.
        cure: What to do, a sentence.

    Raises:
        HAMUValueError: If it is not.

    Example:
        >>> import torch
        >>> check_count("steps", torch.tensor(3))
        3
        >>> check_count("steps", 1.5)
        Traceback (most recent call last):
        ...
        hamu_lightning.errors.HAMUValueError: Expected `steps` to be at least 1, a whole number, but got 1.5.
    """
    wanted = f"at least {least}" if most == _MOST else f"between {least} and {most}"
    number = _as_int(value)
    if number is None:
        raise _refusal(name, f"{wanted}, a whole number", value, cure)
    if not least <= number <= most:
        raise _refusal(name, wanted if number < least else f"at most {most}", number, cure)
    return number


def check_seed(value: object, name: str = "seed") -> int:
    """Raise unless a value can be a seed of every generator: a whole number of 64 bits; return it as Python's."""
    return check_count(name, value, least=-(2**63))


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    wanted: str = "",
    cure: str = "",
) -> float:
    """Raise unless a value is a finite number in a range; return it as a float.

    Args:
        name: The argument's name, as its caller knows it.
        value: What was given.
        least: It must not be less.
        above: It must be more.
        most: It must not be more.
        below: It must be less.
        wanted: What it should be, in words; default: what the range says.
        cure: What to do, a sentence.

    Raises:
        HAMUValueError: If it is not.

    Example:
        >>> import torch
        >>> check_number("floor", torch.tensor(0.5), least=0)
        0.5
        >>> check_number("floor", None, least=0)
        Traceback (most recent call last):
        ...
        hamu_lightning.errors.HAMUValueError: Expected `floor` to be at least 0, a finite number, but got None.
    """
    limits = [
        (words, limit, holds)
        for words, limit, holds in (
            ("positive" if above == 0 else f"above {above}", above, operator.gt),
            (f"at least {least}", least, operator.ge),
            (f"at most {most}", most, operator.le),
            (f"below {below}", below, operator.lt),
        )
        if limit is not None
    ]
    is_between = None not in (above, below) or None not in (least, most)
    between = " and ".join(f"{limit}" for _, limit, _ in limits)
    in_range = wanted or (f"between {between}" if is_between else " and ".join(words for words, _, _ in limits))
    number = _as_float(value)
    if number is None:
        kind = wanted or ", ".join(filter(None, (in_range, "a finite number")))
        raise _refusal(name, kind, value, _YAML if isinstance(value, str) else cure)
    if not math.isfinite(number):
        raise _refusal(name, in_range or "a finite number", number, cure or "It has to be finite.")
    if not all(holds(number, limit) for _, limit, holds in limits):
        raise _refusal(name, in_range, number, cure)
    return number


def check_positive(name: str, value: object, cure: str = "") -> float:
    """Raise unless a value is a positive and finite number; return it as a float.

    Args:
        name: The argument's name, as its caller knows it.
        value: What was given.
        cure: What to do, a sentence.

    Raises:
        HAMUValueError: If it is not.

    Example:
        >>> check_positive("radius", -1.0)
        Traceback (most recent call last):
        ...
        hamu_lightning.errors.HAMUValueError: Expected `radius` to be positive, but got -1.0.
    """
    return check_number(name, value, above=0, cure=cure)


def check_optional(check: Callable[..., _T], name: str, value: object, **limits: Any) -> _T | None:
    """Return None for None, and else what a check returns.

    Args:
        check: One of the checks of this module.
        name: The argument's name, as its caller knows it.
        value: What was given.
        **limits: More arguments of the check.

    Example:
        >>> check_optional(check_count, "steps", None), check_optional(check_count, "steps", 3, least=2)
        (None, 3)
    """
    return None if value is None else check(name, value, **limits)


def store(settings: object, **values: object) -> None:
    """Set fields of a frozen dataclass, in its `__post_init__`, to what checks returned.

    Args:
        settings: The dataclass.
        **values: For the names of fields their values.
    """
    for name, value in values.items():
        object.__setattr__(settings, name, value)


def _as_int(value: object) -> int | None:
    """A whole number as Python's; None for anything else."""
    value = _unwrap(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _as_float(value: object) -> float | None:
    """A real number as Python's, infinite where it is too large; None for anything else."""
    value = _unwrap(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _unwrap(value: Any) -> Any:
    """What a 0-d tensor or array, or a number of numpy, holds; anything else as it is."""
    if isinstance(value, type) or getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except (RuntimeError, NotImplementedError):  # on the meta device there is nothing
        return value


def _refusal(name: str, wanted: str, value: object, cure: str = "") -> HAMUValueError:
    return HAMUValueError(f"Expected `{name}` to be {wanted}, but got {describe(value)}.{cure and f' {cure}'}")
