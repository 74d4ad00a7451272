"""A loader's twin, to be read beside it: once, or again and again with workers of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from hamu_lightning.callbacks import _compat
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.loaders import length_of, own_generators, stop_workers
from hamu_lightning.randomness import RandomStream

_SHARED = (Dataset, Tensor, np.ndarray, DataLoader)


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
    if isinstance(loader, _compat.CombinedBatches):
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

    Attributes:
        length: How many batches a pass has; None where that is not known.

    Raises:
        HAMUValueError: If the loader cannot be read beside a pass that is under way.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = twin_loader(_compat.without_indices(loader))
        self._parts: Sequence[Any] = getattr(self._loader, "loaders", (self._loader,))
        self._samplers = [_keep_workers(part) for part in self._parts]
        self._generators = [g for part in self._parts for g in own_generators(part)]
        self._states = [generator.get_state() for generator in self._generators]
        self.length = length_of(self._loader)

    def batches(self, most: int | None = None) -> Iterator[Any]:
        """Read a pass.

        Args:
            most: Of more batches than that, so many are read, at equal distances in the pass; the first ones where the
                length is not known.
        """
        numbers = None
        if most is not None:
            n = most if self.length is None else self.length
            numbers = range(n) if n <= most else [(2 * i + 1) * n // (2 * most) for i in range(most)]
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
        sampler = self._samplers[0]
        if len(self._samplers) == 1 and sampler is not None:
            sampler.numbers = None if numbers is None else frozenset(numbers)  # the others are not even loaded
            yield from self._loader
            return
        last = None if numbers is None else max(numbers, default=-1)
        # A stream may remember its place: each pass begins with a copy of the first one, unless workers have copies.
        has_workers = any(getattr(part, "persistent_workers", False) for part in self._parts)
        for number, batch in enumerate(self._loader if has_workers else twin_loader(self._loader)):
            if numbers is None or number in numbers:
                yield batch
            if number == last:
                return

    def close(self) -> None:
        """Let the workers go; a later `batches()` starts them again."""
        for part in self._parts:
            stop_workers(part)


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
    except (TypeError, RuntimeError, NotImplementedError):
        return value  # what cannot be copied is shared


def copied(batch: Any) -> Any:
    """A copy of a batch that can be edited in place."""
    try:
        return copy.deepcopy(batch)
    except (TypeError, RuntimeError, NotImplementedError):
        return batch  # what cannot be copied is handed on as it is
