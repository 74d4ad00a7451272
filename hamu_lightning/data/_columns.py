"""What identifies each sample of a dataset: its place, a column, or what an attribute holds for it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from hamu_lightning.checks import describe, is_iterable
from hamu_lightning.data._ids import as_key
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.loaders import length_of

By: TypeAlias = "str | int | Callable[[Any], Sequence[Any]] | Sequence[Any] | None"
# For each way to write an id the one of each sample; None where a sample has no id that is written so.
Spellings: TypeAlias = "list[Sequence[Hashable | None]]"
# A mapping with more entries is no table of columns.
_MOST_NAMES = 100


def read_spellings(dataset: Any, by: Any) -> Spellings:
    """Return what the samples of a dataset may be called.

    Args:
        dataset: A dataset with a length.
        by: The name of a column or attribute, the number of a tensor, the values themselves, or a function of the
            dataset that returns them; None for positions.

    Raises:
        HAMUValueError: If there is no such column.
    """
    size = length_of(dataset) or 0
    if by is None:
        return [range(size)]
    if callable(by) or not isinstance(by, str | int):
        values = by(dataset) if callable(by) else by
        if length_of(values) != size:
            raise HAMUValueError(
                f"Expected `by` to give a value for each of the {size} samples, but got {describe(values)}. "
                "Give one for each, in the order of the Dataset."
            )
        return [_keys(values)]
    found = _find(dataset, by, size)
    if found is None:
        known = sorted(_known(dataset, size))
        raise HAMUValueError(
            f"Expected the samples of {type(dataset).__name__} to have {by!r}, but no column or attribute of that name "
            f"has a value for each of them. There is {', '.join(map(repr, known)) or 'none'}; or give the values "
            "themselves, by=values, in the order of the Dataset."
        )
    return found


def _find(dataset: Any, by: str | int, size: int) -> Spellings | None:
    if isinstance(dataset, Subset):
        inner = _find(dataset.dataset, by, len(dataset.dataset))  # type: ignore[arg-type]
        return inner and [[column[int(i)] for i in dataset.indices] for column in inner]
    if isinstance(dataset, ConcatDataset):
        return _join([(_find(part, by, len(part)), len(part)) for part in dataset.datasets])  # type: ignore[arg-type]
    if isinstance(by, int):
        is_there = isinstance(dataset, TensorDataset) and -len(dataset.tensors) <= by < len(dataset.tensors)
        return [_keys(dataset.tensors[by])] if is_there else None
    own = _if_one_each(getattr(dataset, by, None), size)
    for values in (own, *(_column(table, by, size) for table in (dataset, *_held(dataset)))):
        if values is not None:
            return _spell(dataset, by, values)
    wrapped = [part for part in _held(dataset) if isinstance(part, Dataset) and length_of(part) == size]
    if len(wrapped) == 1:
        return _find(wrapped[0], by, size)
    first = dataset[0] if size else None
    return [[as_key(dataset[i][by]) for i in range(size)]] if isinstance(first, Mapping) and by in first else None


def _join(parts: list[tuple[Spellings | None, int]]) -> Spellings | None:
    if any(found is None for found, _ in parts):
        return None
    most = max(len(found or ()) for found, _ in parts)
    columns: list[Sequence[Hashable | None]] = []
    for number in range(most):
        padded = [found[number] if found and number < len(found) else [None] * size for found, size in parts]
        columns.append([key for column in padded for key in column])
    return columns


def _held(dataset: Any) -> list[Any]:
    return [*getattr(dataset, "__dict__", {}).values()]


def _column(table: Any, by: str, size: int) -> Any:
    """The values that a table or a list of records has under a name; None unless there is one for each sample."""
    if by in _names(table) and not _is_by_position(table):
        return _if_one_each(table[by], size)
    if not isinstance(table, list) or len(table) != size:
        return None
    values = [_field(record, by) for record in table]
    return None if any(value is None for value in values) else values


def _is_by_position(table: Any) -> bool:
    return isinstance(table, Dataset) and getattr(table, "column_names", None) is None


def _names(table: Any) -> list[Any]:
    """The columns of a table: of a mapping, or of pandas, pyarrow and Hugging Face."""
    if isinstance(table, Mapping):
        return [*table]
    names = getattr(table, "column_names", None)
    names = getattr(table, "columns", None) if names is None else names
    return [*names] if names is not None and is_iterable(names) else []


def _field(record: Any, name: str) -> Any:
    return record.get(name) if isinstance(record, Mapping) else getattr(record, name, None)


def _if_one_each(values: Any, size: int) -> Any:
    is_plain = isinstance(values, str | bytes | Mapping) or callable(values) or values is None
    return None if is_plain or length_of(values) != size else values


def _keys(values: Any) -> list[Hashable | None]:
    flat = getattr(values, "to_numpy", lambda: values)()
    if isinstance(flat, Tensor | np.ndarray):
        flat = flat.reshape(len(flat), -1)[:, 0].tolist()
    return [None if _is_gap(value) else as_key(value) for value in flat]


def _is_gap(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _spell(dataset: Any, by: str, values: Any) -> Spellings:
    """The values, and what else people call them: of files the path from the root and the name, of labels the class."""
    if by in ("samples", "imgs") and isinstance(values[0], tuple | list):
        values = [sample[0] for sample in values]
    if all(isinstance(value, str | os.PathLike) for value in values):
        return _spell_paths([str(as_key(value)) for value in values], getattr(dataset, "root", None))
    keys, classes = _keys(values), getattr(dataset, "class_to_idx", None)
    if by != "targets" or not isinstance(classes, Mapping):
        return [keys]
    names = {as_key(number): as_key(name) for name, number in classes.items()}
    return [keys, [names.get(key) for key in keys]]


def _spell_paths(texts: list[str], root: Any) -> Spellings:
    """Texts as they are, and as paths."""
    paths = [PurePath(text) for text in texts]
    columns: Spellings = [texts, [str(path) for path in paths]]
    if isinstance(root, str | os.PathLike):
        columns.append([str(path.relative_to(root)) if path.is_relative_to(root) else None for path in paths])
    often = Counter(path.name for path in paths)
    columns.append([path.name if often[path.name] == 1 else None for path in paths])
    return columns


def _known(dataset: Any, size: int) -> set[str]:
    """The names that could have been given."""
    if isinstance(dataset, Subset):
        return _known(dataset.dataset, len(dataset.dataset))  # type: ignore[arg-type]
    own = {name for name, value in getattr(dataset, "__dict__", {}).items() if _if_one_each(value, size) is not None}
    tables = [names for table in (dataset, *_held(dataset)) if len(names := _names(table)) < _MOST_NAMES]
    return own | {str(name) for names in tables for name in names}
