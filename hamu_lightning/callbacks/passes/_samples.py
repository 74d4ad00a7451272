"""Which samples: splitting a dataset, and finding those that two loaders share."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

from torch.utils.data import Dataset, Subset

from hamu_lightning.errors import HAMUValueError


def split_forget(dataset: Dataset[Any], indices: Iterable[int]) -> tuple[Subset[Any], Subset[Any]]:
    """Split a dataset into what is to be retained and what is to be forgotten.

    Args:
        dataset: A dataset with a length: the training data.
        indices: The positions of the samples to forget: a list, a range, a tensor or an array of integers.

    Returns:
        `(retain, forget)`: two disjoint subsets that together are the dataset, in its order.

    Raises:
        HAMUValueError: If an index is out of range, occurs twice, or if one of the two subsets would be empty.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> retain, forget = split_forget(TensorDataset(torch.arange(5)), [1, 3])
        >>> retain.indices, forget.indices
        ([0, 2, 4], [1, 3])
    """
    chosen = [int(i) for i in indices]
    size = len(dataset)  # type: ignore[arg-type]
    outside = [i for i in chosen if not 0 <= i < size]
    if outside:
        raise HAMUValueError(
            f"Expected `indices` to be in 0 .. {size - 1}, but got {outside[:5]}. "
            "A boolean mask becomes indices by mask.nonzero()."
        )
    if len(set(chosen)) != len(chosen):
        raise HAMUValueError(f"Expected `indices` to be different, but {len(chosen) - len(set(chosen))} occur twice.")
    if not 0 < len(chosen) < size:
        raise HAMUValueError(
            f"Expected some samples to forget and some to retain, but got {len(chosen)} of {size} to forget."
        )
    forgotten = set(chosen)
    return Subset(dataset, [i for i in range(size) if i not in forgotten]), Subset(dataset, sorted(chosen))


def count_shared_samples(a: object, b: object) -> int:
    """Count the samples that two loaders share, as far as it can be seen: indices into the same Dataset object."""
    (base_a, indices_a), (base_b, indices_b) = _trace_indices(a), _trace_indices(b)
    if base_a is None or base_a is not base_b:
        return 0
    return len(indices_a & indices_b)


def _trace_indices(loader: object) -> tuple[object, set[int]]:
    """The dataset behind a loader's subsets, and the indices into it; `(None, {})` where there are none to see."""
    dataset = getattr(loader, "dataset", None)
    layers = []
    while isinstance(dataset, Subset):
        layers.append(dataset.indices)
        dataset = dataset.dataset
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        return None, set()
    indices = range(len(dataset))
    for layer in reversed(layers):
        indices = [indices[int(i)] for i in layer]  # type: ignore[assignment]
    return dataset, set(indices)
