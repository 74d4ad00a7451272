"""Which samples: splitting a dataset."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from hamu_lightning.checks import describe
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.loaders import length_of


def split_forget(dataset: Dataset[Any], indices: Iterable[int] | Tensor) -> tuple[Subset[Any], Subset[Any]]:
    """Split a dataset into what is to be retained and what is to be forgotten.

    Args:
        dataset: A dataset with a length: the training data.
        indices: The positions of the samples to forget: a list, a range, a tensor, an array or a column of integers;
            or a boolean mask with one entry for each sample.

    Returns:
        `(retain, forget)`: two disjoint subsets that together are the dataset, in its order.

    Raises:
        HAMUValueError: If the dataset has no length, or an index is no integer, out of range, occurs twice, or if one
            of the two subsets would be empty.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> retain, forget = split_forget(TensorDataset(torch.arange(5)), [1, 3])
        >>> retain.indices, forget.indices
        ([0, 2, 4], [1, 3])
    """
    size = length_of(dataset)
    if size is None or not hasattr(dataset, "__getitem__"):
        raise HAMUValueError(
            f"Expected `dataset` to be a Dataset with a length and samples by position, but got {describe(dataset)}. "
            "Of a stream, filter what is to be forgotten into one of its own."
        )
    chosen = _positions(indices, size)
    outside = [i for i in chosen if not 0 <= i < size]
    if outside:
        raise HAMUValueError(
            f"Expected `indices` to be in 0 .. {size - 1}, but got {outside[:5]}. Count from 0, and from the beginning."
        )
    if len(set(chosen)) != len(chosen):
        raise HAMUValueError(f"Expected `indices` to be different, but {len(chosen) - len(set(chosen))} occur twice.")
    if not 0 < len(chosen) < size:
        raise HAMUValueError(
            f"Expected some samples to forget and some to retain, but got {len(chosen)} of {size} to forget."
        )
    forgotten = set(chosen)
    return Subset(dataset, [i for i in range(size) if i not in forgotten]), Subset(dataset, sorted(chosen))


def _positions(indices: Any, size: int) -> list[int]:
    """The positions that indices or a mask stand for.

    Raises:
        HAMUValueError: If they are neither.
    """
    # A tensor, an array or a column of a table becomes a list of Python's own numbers; [k, 1] of `nonzero()` is flat.
    is_column = hasattr(indices, "to_numpy") and getattr(indices, "ndim", 1) == 1
    values = indices.to_numpy() if is_column else indices
    if isinstance(values, Tensor | np.ndarray):
        values = values.reshape(-1).tolist() if values.ndim == 1 or values.shape[1:] == (1,) else None
    if isinstance(values, str | bytes | Dataset) or not isinstance(values, Iterable):
        raise HAMUValueError(f"{_EXPECTED} got {type(indices).__name__}{_shape(indices)}. {_CURE}")
    values = list(values)
    flags = [isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) is torch.bool for value in values]
    if any(flags):
        if not all(flags) or len(values) != size:
            raise HAMUValueError(
                f"{_EXPECTED} got {sum(flags)} of True or False among {len(values)} values for {size} samples. A mask "
                "has one of them for each sample of the dataset."
            )
        return [i for i, is_chosen in enumerate(values) if is_chosen]
    try:
        return [index(value) for value in values]
    except (TypeError, RuntimeError, ValueError) as error:
        kinds = ", ".join(sorted({type(value).__name__ for value in values if not isinstance(value, int)}))
        raise HAMUValueError(f"{_EXPECTED} got {kinds} among them. {_CURE}") from error


def _shape(value: Any) -> str:
    return f" of shape {list(value.shape)}" if hasattr(value, "shape") else ""


_EXPECTED = "Expected `indices` to be positions, each an integer, or a boolean mask of the length of the dataset, but"
_CURE = (
    "Numbers that were read as text or as floats (a gap in a column does that) have to be cleaned and made integers "
    "first; names become positions by looking them up."
)
