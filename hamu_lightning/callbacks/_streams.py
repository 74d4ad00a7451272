"""Where forget batches come from: splitting a dataset, cycling a loader, finding shared samples."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.randomness import RandomStream


class EmptyStreamError(HAMUStateError):
    """A pass over the forget loader had no batch."""


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


class ForgetStream:
    """An endless stream of forget batches. Each pass is a fresh `iter()`, so that a shuffling loader shuffles again.

    Args:
        loader: The forget loader.
        random: All draws, those of `iter()` among them, come from this stream; it must be active around `next()`, and
            advance by one draw for each batch.
    """

    def __init__(self, loader: Iterable[Any], random: RandomStream) -> None:
        self.loader = loader
        self._random = random
        self._iterator: Iterator[Any] | None = None
        self._pass, self._taken = 0, 0
        self._loaders: Sequence[object] = getattr(loader, "loaders", (loader,))
        # A loader that collates makes new objects for each batch. Others may hand out the same one again, and modules
        # edit batches in place.
        self._hands_out_new = all(isinstance(p, DataLoader) and p.batch_sampler is not None for p in self._loaders)
        random.generators = [generator for part in self._loaders for generator in _own_generators(part)]

    @property
    def length(self) -> int | None:
        """How many batches a pass has, where the loader knows."""
        try:
            return len(self.loader)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None

    def __next__(self) -> Any:
        """Return the next batch, beginning a new pass where one has ended.

        Raises:
            EmptyStreamError: If a whole pass has no batch.
        """
        # Some loaders end with an error instead of StopIteration: their length says when a pass is over.
        if self._iterator is None or self._taken == self.length:
            self._begin_pass()
        batch = self._take()
        if batch is _END:
            self._begin_pass()
            batch = self._take()
        if batch is _END:
            raise EmptyStreamError(EMPTY_STREAM)
        self._taken += 1
        return batch if self._hands_out_new else copied(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, in numbers."""
        return {"draw": self._random.draw, "pass": self._pass, "taken": self._taken, "length": self.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position: the pass is begun again, and its first batches are dropped.

        Another process may have saved it, with another number of batches in a pass: then they are counted anew.
        """
        number, taken = state["pass"], state["taken"]
        if self.length and self.length != state["length"]:
            number, taken = 1 + (state["draw"] - 1) // self.length, 1 + (state["draw"] - 1) % self.length
        self._pass = number - 1 if taken else number
        for draw in range(state["draw"] - taken, state["draw"]):
            self._random.draw = draw + 1
            with self._random.active():
                if self._iterator is None:
                    self._begin_pass()
                self._take()
        self._random.draw, self._taken = state["draw"], taken

    def _begin_pass(self) -> None:
        # The end of the last pass may have drawn; a resumed run does not see it.
        self._random.reseed()
        for part in self._loaders:
            set_epoch = getattr(getattr(part, "sampler", None), "set_epoch", None)
            if callable(set_epoch):
                set_epoch(self._pass)
        self._iterator = iter(self.loader)
        self._pass, self._taken = self._pass + 1, 0

    def _take(self) -> Any:
        assert self._iterator is not None
        return next(self._iterator, _END)


_END = object()
EMPTY_STREAM = (
    "Expected the forget loader to yield batches, but a pass over it yielded none. "
    "Give it at least one batch (check drop_last, the sampler and the indices)."
)


def _own_generators(loader: object) -> list[torch.Generator]:
    """The generators that the loader and its samplers draw from besides the global one."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def copied(batch: Any) -> Any:
    """A copy of a batch that can be edited in place."""
    try:
        return copy.deepcopy(batch)
    except (TypeError, RuntimeError, NotImplementedError):
        return batch  # what cannot be copied is handed on as it is
