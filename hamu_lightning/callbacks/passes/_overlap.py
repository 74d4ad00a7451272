"""Finds samples that two loaders read, and share, through subsets, concatenations, wrappers and shared tensors."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

# Positions in what holds the samples: an array, or a range where all of them are meant.
_Positions = Any
_SEE_ALL = (RandomSampler, SequentialSampler, WeightedRandomSampler, DistributedSampler)


def count_shared_samples(a: object, b: object) -> int:
    """Count the samples that two loaders or Datasets share, as far as it can be seen.

    Seen are positions in one Dataset, in tensors of one storage, or in one folder (`root`): through Subset and
    ConcatDataset, samplers of subsets, loaders that are combined, and Datasets that wrap one of the same length.
    """
    first, second = _mark_samples(a), _mark_samples(b)
    count = 0
    for base in first.keys() & second.keys():
        one, other = first[base], second[base]
        size = min(len(one), len(other))
        count += int(np.count_nonzero(one[:size] & other[:size]))
    return count


def read_positions(loader: Any) -> list[int] | None:
    """The positions in its Dataset that a DataLoader reads in a pass, in ascending order of reading without a shuffle.

    None where they are not known: for a stream, for other iterables, and for samplers that do not tell.

    Example:
        >>> read_positions(DataLoader([5, 6, 7], batch_size=2, shuffle=True)), read_positions([5, 6])
        ([0, 1, 2], None)
    """
    if not isinstance(loader, DataLoader) or loader.batch_size is None or isinstance(loader.dataset, IterableDataset):
        return None
    positions = _sampled(loader)
    if positions is None:
        return list(range(len(loader.dataset)))  # type: ignore[arg-type]
    return [int(position) for position in positions] or None


def _mark_samples(loader: object) -> dict[Hashable, np.ndarray[Any, Any]]:
    """For each thing that holds samples which positions in it are read: one byte for each, whatever the order."""
    marks: dict[Hashable, np.ndarray[Any, Any]] = {}
    for base, positions in _trace_loader(loader):
        if not len(positions):
            continue
        is_range = isinstance(positions, range)
        end = 1 + (positions[-1] if is_range else int(positions.max()))
        mark = marks.get(base, np.zeros(0, dtype=bool))
        if len(mark) < end:
            mark = marks[base] = np.concatenate([mark, np.zeros(end - len(mark), dtype=bool)])
        mark[slice(positions.start, positions.stop) if is_range else positions] = True
    return marks


def _trace_loader(loader: Any) -> Iterator[tuple[Hashable, _Positions]]:
    parts = getattr(loader, "loaders", loader)
    parts = list(parts.values()) if isinstance(parts, Mapping) else parts
    if isinstance(parts, list | tuple) and all(isinstance(part, DataLoader) for part in parts):
        for part in parts:
            yield from _trace_loader(part)
    elif isinstance(loader, Dataset):
        yield from _trace(loader, None)
    elif hasattr(loader, "dataset"):
        positions = _sampled(loader)
        if positions is None or len(positions):
            yield from _trace(loader.dataset, positions)


def _sampled(loader: Any) -> _Positions:
    """The positions that a loader reads; None for all; none where its sampler does not tell."""
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    if batch_sampler is not None and not isinstance(batch_sampler, BatchSampler):
        sampler = getattr(batch_sampler, "sampler", batch_sampler)
    elif batch_sampler is not None:
        sampler = batch_sampler.sampler
    if isinstance(sampler, SubsetRandomSampler):
        return _as_positions(sampler.indices)
    is_of_dataset = getattr(sampler, "dataset", loader.dataset) is loader.dataset
    return None if sampler is None or (isinstance(sampler, _SEE_ALL) and is_of_dataset) else ()


def _trace(dataset: Any, positions: _Positions) -> Iterator[tuple[Hashable, _Positions]]:
    """Follow positions in a Dataset (None for all) down to what holds the samples."""
    size = len(dataset) if isinstance(dataset, Sized) and hasattr(dataset, "__getitem__") else None
    if size is None:
        return
    positions = range(size) if positions is None else positions
    inner = _as_positions(dataset.indices) if isinstance(dataset, Subset) else None
    wrapped = None if isinstance(dataset, Subset) else _wrapped(dataset, size)
    if inner is not None:
        yield from _trace(dataset.dataset, _take(np.where(inner < 0, inner + len(dataset.dataset), inner), positions))
    elif isinstance(dataset, ConcatDataset):
        starts = [0, *dataset.cumulative_sizes]
        for part, start, end in zip(dataset.datasets, starts, starts[1:], strict=False):
            yield from _trace(part, _between(positions, start, end))
    elif isinstance(dataset, TensorDataset):
        yield _locate(dataset, positions)
    elif wrapped is not None:
        yield from _trace(wrapped, positions)
    else:
        yield _identify(dataset, size), positions


def _as_positions(indices: Any) -> _Positions:
    """Indices as an array; None where they are no integers."""
    try:
        array = np.asarray(indices)
    except (TypeError, ValueError, RuntimeError):
        return None
    return array if array.ndim == 1 and (array.dtype.kind in "iu" or not array.size) else None


def _take(array: np.ndarray[Any, Any], positions: _Positions) -> np.ndarray[Any, Any]:
    chosen: np.ndarray[Any, Any] = (
        array[slice(positions.start, positions.stop)] if _is_range(positions) else array[positions]
    )
    return chosen.astype(np.int64, copy=False)


def _between(positions: _Positions, start: int, end: int) -> _Positions:
    if _is_range(positions):
        return range(max(positions.start, start) - start, max(min(positions.stop, end), start) - start)
    return positions[(positions >= start) & (positions < end)] - start


def _is_range(positions: _Positions) -> bool:
    return isinstance(positions, range)


def _locate(dataset: TensorDataset, positions: _Positions) -> tuple[Hashable, _Positions]:
    """Rows of a storage, which several TensorDatasets may share."""
    tensor = dataset.tensors[0]
    if tensor.layout != torch.strided or not tensor.numel() or not tensor.stride(0):
        return id(dataset), positions
    row, column = divmod(int(tensor.storage_offset()), tensor.stride(0))
    base = tensor.untyped_storage().data_ptr(), tensor.dtype, tensor.stride(0), column
    if _is_range(positions):
        return base, range(positions.start + row, positions.stop + row)
    return base, positions + row


def _wrapped(dataset: Any, size: int) -> Any:
    """The Dataset that another one of the same length wraps, if it is the only one it holds."""
    held = [value for value in getattr(dataset, "__dict__", {}).values() if isinstance(value, Dataset)]
    is_same = len(held) == 1 and isinstance(held[0], Sized) and len(held[0]) == size
    return held[0] if is_same and hasattr(held[0], "__getitem__") else None


def _identify(dataset: Any, size: int) -> Hashable:
    """What tells whether two Datasets hold the same samples: being one object, or being made alike over one folder."""
    if not isinstance(getattr(dataset, "root", None), str | os.PathLike):
        return id(dataset)
    plain = {name: str(x) for name, x in vars(dataset).items() if isinstance(x, str | os.PathLike | int)}
    return type(dataset), size, tuple(sorted(plain.items()))
