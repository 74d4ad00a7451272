"""A loader's twin, to be read beside it: once, or again and again with workers of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from hamu_lightning.callbacks import _compat_loaders
from hamu_lightning.callbacks.passes._batches import BatchSizes
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.loaders import length_of, own_generators, stop_workers
from hamu_lightning.randomness import RandomStream

_SHARED = (Dataset, Tensor, np.ndarray, DataLoader)
# A stream of unknown length may have no end: of such a one no more than so many batches are read.
_MOST_OF_A_STREAM = 1024


def twin_loader(loader: Any) -> Any:
    """A loader that can be iterated beside this one, with samplers, generators and a place in the data of its own.

    Raises:
        HAMUValueError: If the loader is used up by iterating it, or keeps what cannot be copied.
    """
    if isinstance(loader, Iterator):
        raise HAMUValueError(
            f"Expected a loader that can be iterated again, but got a {type(loader).__name__}, which can be iterated "
            "only once: reading it beside the fit would take its batches away. Give a DataLoader or a list."
        )
    if isinstance(loader, _compat_loaders.CombinedBatches):
        return loader.twin(twin_loader)
    if isinstance(loader, Sequence | Tensor):
        return loader
    if not isinstance(loader, DataLoader):
        return _read_apart(loader)
    twin = copy.copy(loader)
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) and not loader.num_workers:  # workers have copies
        dataset = _read_apart(dataset)
    memo: dict[int, Any] = {id(loader.dataset): dataset}
    names = ("sampler", "batch_sampler", "generator")
    # Not by assignment, which DataLoader forbids. Persistent workers belong to the first one's iterator.
    own = {name: _deep_copied(getattr(loader, name), memo) for name in names}
    twin.__dict__.update(own, dataset=dataset, _iterator=None)
    return twin


class MeasuringLoader:
    """All data of a loader, read beside it as often as it is measured on.

    Its workers are started once, and stay until `close()`. What they draw depends on the random numbers at `batches()`
    alone, not on what was read before, so that a resumed fit measures the same.

    Args:
        loader: A DataLoader, a list of batches, or another iterable of batches.
        most: Of more batches than that, so many are read, at equal distances in the pass; the first ones where the
            length is not known. None for all; of a loader of unknown length the first 1,024, with a warning where there
            are more.

    Attributes:
        length: How many batches a pass has; None where that is not known.
        samples: How many samples the last batch had; NaN where that cannot be told.

    Raises:
        HAMUValueError: If the loader cannot be read beside a pass that is under way.
    """

    samples = math.nan

    def __init__(self, loader: Any, most: int | None = None) -> None:
        self._most, self._sizes = most, BatchSizes(loader)
        self._loader = twin_loader(_compat_loaders.without_indices(loader))
        self._parts: Sequence[Any] = getattr(self._loader, "loaders", (self._loader,))
        self._samplers = [_keep_workers(part) for part in self._parts]
        self._generators = [g for part in self._parts for g in own_generators(part)]
        self._states = [generator.get_state() for generator in self._generators]
        self.length = length_of(self._loader)
        self._may_be_endless = self.length is None and most is None
        if self._may_be_endless:
            self._most = _MOST_OF_A_STREAM + 1

    def batches(self, most: int | None = None, numbers: Sequence[int] | None = None) -> Iterator[Any]:
        """Read a pass.

        Args:
            most: In the place of the `most` of the loader.
            numbers: Of the batches that are read, ascending, in the place of `most`.
        """
        most = most or self._most
        if numbers is None and most is not None:
            numbers = spread(most if self.length is None else self.length, most)
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)
        try:
            yield from self._read(numbers)
        except BaseException as error:
            # Workers that have failed, or stand in the middle of a stream, are not asked again.
            if not isinstance(error, GeneratorExit) or None in self._samplers:
                self.close()
            raise

    __iter__ = batches

    def _read(self, numbers: Sequence[int] | None) -> Iterator[Any]:
        for number, batch in self._choose(numbers):
            self.samples = self._sizes.count(batch, number)
            yield batch

    def _choose(self, numbers: Sequence[int] | None) -> Iterator[tuple[int, Any]]:
        """The batches with these numbers, or all, each with its number."""
        sampler = self._samplers[0]
        if len(self._samplers) == 1 and sampler is not None:
            sampler.numbers = None if numbers is None else frozenset(numbers)  # the others are not even loaded
            yield from zip(numbers or count(), self._loader, strict=False)
            return
        last = None if numbers is None else max(numbers, default=-1)
        # A stream may remember its place: each pass begins with a copy of the first one, unless workers have copies.
        has_workers = any(getattr(part, "persistent_workers", False) for part in self._parts)
        for number, batch in enumerate(self._loader if has_workers else twin_loader(self._loader)):
            if self._may_be_endless and number == _MOST_OF_A_STREAM:
                rank_zero_warn(
                    f"A loader of unknown length has more than {_MOST_OF_A_STREAM:,} batches: what is measured on it "
                    "is measured on those. Give it a length, `__len__`, where it has one."
                )
                return
            if numbers is None or number in numbers:
                yield number, batch
            if number == last:
                return

    def close(self) -> None:
        """Let the workers go; a later `batches()` starts them again."""
        for part in self._parts:
            stop_workers(part)


def spread(length: int, most: int) -> Sequence[int]:
    """So many numbers of those below a length, at equal distances; all where there are no more.

    Example:
        >>> spread(9, 3), spread(2, 3)
        ([1, 4, 7], range(0, 2))
    """
    return range(length) if length <= most else [(2 * i + 1) * length // (2 * most) for i in range(most)]


class _ChosenBatches:
    """In the place of a sampler: those of its entries that are asked for, with seeds for workers."""

    def __init__(self, sampler: Iterable[Any], is_seeded: bool) -> None:
        self._sampler, self._is_seeded = sampler, is_seeded
        self.numbers: frozenset[int] | None = None

    def __len__(self) -> int:
        return len(self._sampler) if self.numbers is None else len(self.numbers)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        seed = int(torch.empty((), dtype=torch.int64).random_()) if self._is_seeded else 0
        for number, indices in enumerate(self._sampler):
            if self.numbers is None or number in self.numbers:
                yield _SeededIndices(indices, seed, number) if self._is_seeded else indices


class _SeededIndices(list[Any]):
    """The indices of a batch. A worker that goes through them draws, from then on, the random numbers of this batch."""

    def __init__(self, indices: Iterable[Any], *key: int) -> None:
        super().__init__(indices)
        self.key = key

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is not None:
            RandomStream(*self.key).reseed()
        return super().__iter__()


def _keep_workers(twin: Any) -> _ChosenBatches | None:
    """Let a twin keep its workers, and choose its batches; return what does where the pass has places to choose."""
    if not isinstance(twin, DataLoader):
        return None
    if isinstance(twin.dataset, IterableDataset):
        return None  # where it is read anew, each worker may need a fresh copy of it
    has_workers, is_batched = twin.num_workers > 0, twin.batch_sampler is not None
    name = "batch_sampler" if is_batched else "sampler"
    sampler = _ChosenBatches(getattr(twin, name), is_seeded=has_workers and is_batched)
    # Seeds of workers come from a generator aside: the first pass, which starts them, would draw more than the others.
    twin.__dict__.update({name: sampler}, persistent_workers=has_workers, generator=torch.Generator())
    return sampler


def _read_apart(iterable: Any) -> Any:
    """A copy of an iterable that has a place in its data of its own; the data are shared.

    Raises:
        HAMUValueError: If it cannot be copied.
    """
    shared = {id(value): value for value in getattr(iterable, "__dict__", {}).values() if isinstance(value, _SHARED)}
    try:
        if isinstance(iterable, Iterator):
            raise TypeError("it is its own iterator")
        return copy.deepcopy(iterable, shared)
    except Exception as error:
        raise HAMUValueError(
            f"Expected to read a {type(iterable).__name__} beside the fit, but it cannot be copied: {error}. "
            "Give a DataLoader over a Dataset, or a list of batches."
        ) from error


def _deep_copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value  # what cannot be copied is shared


def copied(batch: Any) -> Any:
    """A copy of a batch that can be edited in place; what in it cannot be copied is handed on as it is."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # a lock, a generator, a tensor with a graph, or a class whose own way of copying fails
        return _copied_by_parts(batch, {})


def _copied_by_parts(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) not in memo:
        memo[id(value)] = value  # until there is a copy, and where none can be made
        with suppress(Exception):
            memo[id(value)] = _copy_one(value, partial(_copied_by_parts, memo=memo))
    return memo[id(value)]


def _copy_one(value: Any, copied_part: Callable[[Any], Any]) -> Any:
    """A copy of a value whose parts are copied by a function."""
    if isinstance(value, tuple):
        parts = map(copied_part, value)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Tensor):
        is_leaf = value.grad_fn is None
        twin: Any = value.detach().clone().requires_grad_(value.requires_grad) if is_leaf else value.clone()
    elif hasattr(value, "__dict__") or isinstance(value, list | dict):
        twin = copy.copy(value)
    else:
        return copy.deepcopy(value)
    if isinstance(value, list):
        twin[:] = map(copied_part, value)
    elif isinstance(value, dict):
        twin.update({key: copied_part(part) for key, part in value.items()})
    for name, part in getattr(value, "__dict__", {}).items():
        vars(twin)[name] = copied_part(part)
    return twin
