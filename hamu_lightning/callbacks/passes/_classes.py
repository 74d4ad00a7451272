"""The labels of a loader's samples, without loading a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

# What datasets call the labels of all their samples.
_NAMES = ("targets", "labels")


def read_labels(loader: Any) -> Tensor | None:
    """The label of each sample that a loader draws in a pass, int64 `[n]`; None where that cannot be told.

    That is: of `TensorDataset` (its last tensor), of datasets with `targets` or `labels`, and of subsets and unions of
    them; where the sampler draws each sample once.

    Example:
        >>> data = TensorDataset(torch.zeros(4, 2), torch.tensor([0, 1, 1, 2]))
        >>> read_labels(DataLoader(Subset(data, [0, 3])))
        tensor([0, 2])
    """
    if not isinstance(loader, DataLoader) or type(loader.batch_sampler) is not BatchSampler:
        return None
    sampler, labels = loader.sampler, labels_of(loader.dataset)
    if labels is None or not isinstance(sampler, SequentialSampler | RandomSampler | SubsetRandomSampler):
        return None
    if isinstance(sampler, SubsetRandomSampler):
        return labels[torch.as_tensor(list(sampler.indices), dtype=torch.int64)]
    is_all = len(sampler) == len(labels) and not getattr(sampler, "replacement", False)
    return labels if is_all else None


def labels_of(dataset: Any) -> Tensor | None:
    """The label of each sample of a dataset, int64 `[n]`; None where that cannot be told."""
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_of(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if isinstance(dataset, TensorDataset):
        return _as_labels(dataset.tensors[-1], dataset)
    found = (getattr(dataset, name, None) for name in _NAMES)
    return next((labels for values in found if (labels := _as_labels(values, dataset)) is not None), None)


def _as_labels(values: Any, dataset: Any) -> Tensor | None:
    """A tensor, an array or a list of labels, one for each sample."""
    if not isinstance(values, Tensor | np.ndarray | Sequence) or isinstance(values, str | bytes):
        return None
    try:
        labels = torch.as_tensor(values).cpu()
        is_one_each = labels.ndim in (1, 2) and labels.numel() == len(labels) == len(dataset)
    except (TypeError, ValueError, RuntimeError):  # no numbers, or of different lengths
        return None
    whole = labels.long()
    return whole.flatten() if is_one_each and bool((whole == labels).all()) else None
