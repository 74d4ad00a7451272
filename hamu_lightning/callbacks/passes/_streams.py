"""An endless stream of batches from a loader that ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from hamu_lightning.callbacks.passes._batches import BatchSizes
from hamu_lightning.callbacks.passes._loaders import copied
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.loaders import length_of, own_generators, set_epoch, stop_workers
from hamu_lightning.randomness import RandomStream


class EmptyStreamError(HAMUStateError):
    """A pass over the forget loader had no batch."""


class ForgetStream:
    """An endless stream of forget batches. Each pass is a fresh `iter()`, so that a shuffling loader shuffles again.

    Args:
        loader: The forget loader.
        random: All draws, those of `iter()` among them, come from this stream; it must be active around `next()`, and
            advance by one draw for each batch.

    Attributes:
        samples: How many samples the last batch had; NaN where that cannot be told.
    """

    samples = math.nan

    def __init__(self, loader: Iterable[Any], random: RandomStream) -> None:
        self.loader = loader
        self._random = random
        self._iterator: Iterator[Any] | None = None
        self._pass, self._taken = 0, 0
        self._loaders: Sequence[object] = getattr(loader, "loaders", (loader,))
        # A loader that collates makes new objects for each batch. Others may hand out the same one again, and modules
        # edit batches in place.
        self._hands_out_new = all(isinstance(p, DataLoader) and p.batch_sampler is not None for p in self._loaders)
        # The length of an IterableDataset is a guess: workers add remainders of their own. Its end is where it ends.
        self._has_length = not any(isinstance(getattr(p, "dataset", None), IterableDataset) for p in self._loaders)
        self._sizes = BatchSizes(loader)
        random.generators = [generator for part in self._loaders for generator in own_generators(part)]

    @property
    def length(self) -> int | None:
        """How many batches a pass has, where the loader knows."""
        return length_of(self.loader)

    def __next__(self) -> Any:
        """Return the next batch, beginning a new pass where one has ended.

        Raises:
            EmptyStreamError: If a whole pass has no batch.
        """
        # Some loaders end with an error instead of StopIteration: their length says when a pass is over.
        if self._iterator is None or (self._has_length and self._taken == self.length):
            self._begin_pass()
        batch = self._take()
        if batch is _END:
            self._begin_pass()
            batch = self._take()
        if batch is _END:
            raise EmptyStreamError(EMPTY_STREAM)
        self.samples = self._sizes.count(batch, self._taken)
        self._taken += 1
        return batch if self._hands_out_new else copied(batch)

    def close(self) -> None:
        """Let persistent workers go."""
        self._iterator = None
        for part in self._loaders:
            stop_workers(part)

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
            set_epoch(part, self._pass)
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
