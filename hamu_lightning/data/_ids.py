"""Ids as people hand them over: lists, arrays, masks, and files with one id in a line or in a column."""

from __future__ import annotations

import csv
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hamu_lightning.checks import describe, is_iterable
from hamu_lightning.errors import HAMUValueError

_WHOLE = re.compile(r"[+-]?\d{1,18}")
# Words: what names a column. Anything with a digit, a point or an "@" is an id: it would be lost without a word.
_NAME = re.compile(r"[^\W\d_]+(?:[ _-]+[^\W\d_]+)*")
_CURE = "Give a list, an array, a mask, or the path of a text or CSV file with one id in each line."


@dataclass(frozen=True)
class Ids:
    """Ids of a request.

    Attributes:
        values: The ids, each as `as_key` makes it.
        may_begin_with_header: Whether the first one may be the name of a column.
    """

    values: list[Hashable]
    may_begin_with_header: bool = False


def as_key(value: Any) -> Hashable:
    """What of an id is compared: a whole number as `int`, text without blanks around it, anything else as it prints."""
    value = value.item() if hasattr(value, "item") and getattr(value, "size", 1) != 0 else value
    if isinstance(value, float) and value.is_integer():
        return int(value)  # a column with a gap in it was read as floats
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return value if isinstance(value, bool | int) else str(value).strip()


def other_key(key: Hashable) -> Hashable:
    """The same id as the other of number and text: files hold text, columns may hold numbers."""
    if isinstance(key, str):
        return int(key) if _WHOLE.fullmatch(key) else key
    return str(key)


def read_ids(name: str, given: Any, column: str | None) -> Ids:
    """Return the ids of a request.

    Args:
        name: What the argument is called.
        given: Ids, or the path of a file.
        column: The column of a CSV file; None for its only one.

    Raises:
        HAMUValueError: If they are none, or there is no such file or column.
    """
    if isinstance(given, str | PathLike):
        ids = _read_file(name, Path(given), column)
    elif isinstance(given, bytes) or not is_iterable(given):
        raise HAMUValueError(f"Expected `{name}` to be ids, but got {describe(given)}. {_CURE}")
    else:
        ids = Ids([as_key(value) for value in _flat(given)])
    if not ids.values:
        raise HAMUValueError(f"Expected at least one id in `{name}`, but it is empty. {_CURE}")
    return ids


def _flat(given: Any) -> Iterable[Any]:
    """One value after the other: of an array or a column Python's own numbers, faster than its elements."""
    flat = getattr(given, "to_numpy", lambda: given)()
    values: Iterable[Any] = flat.reshape(-1).tolist() if isinstance(flat, Tensor | np.ndarray) else flat
    return values


def _read_file(name: str, path: Path, column: str | None) -> Ids:
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel marks the beginning
    except OSError as error:
        raise HAMUValueError(
            f"Expected `{name}` to name a file of ids, but {str(path)!r} cannot be read ({error.strerror}). {_CURE}"
        ) from error
    except UnicodeDecodeError as error:
        raise HAMUValueError(f"Expected {str(path)!r} to be text in UTF-8, but it is not. Save it as UTF-8.") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if path.suffix.lower() not in (".csv", ".tsv"):
        return Ids([as_key(line) for line in lines])
    rows = list(csv.reader(lines, delimiter=max(",;\t", key=lines[0].count) if lines else ","))
    if len({len(row) for row in rows} | {1}) == 1:
        return _read_only_column(rows, column)
    header = [cell.strip() for cell in rows[0]]
    if column not in header:
        # Not what stands there: without a header it is a person's.
        wanted = "one column" if column is None else f"a column {column!r}"
        raise HAMUValueError(
            f"Expected {wanted} in {str(path)!r}, but its first line names {len(header)} others. "
            "Name the column with `by`, or leave one column in the file."
        )
    place = header.index(column)
    return Ids([as_key(row[place]) for row in rows[1:] if len(row) > place and row[place].strip()])


def _read_only_column(rows: list[list[str]], column: str | None) -> Ids:
    values = [as_key(row[0]) for row in rows]
    if values and values[0] == column:
        return Ids(values[1:])
    return Ids(values, may_begin_with_header=bool(values) and _NAME.fullmatch(str(values[0])) is not None)
