"""The samples of a part of the data: each once, in order, with an id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from hamu_lightning.callbacks.goals import one_by_one
from hamu_lightning.callbacks.passes import MeasuringLoader, is_data, read_positions
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.loaders import BATCH_SIZE, batch_size_of, load_like


class Ordered:
    """Reads the samples behind a loader once, beside whatever else reads it: without its shuffle and its `drop_last`.

    Args:
        source: A DataLoader, a Dataset, or another iterable of batches, which is read as it comes.
        like: The loader whose batch size and collation a Dataset follows; None for batches of 128.
        most: So many batches at most, spread over a Dataset; of what comes in no order that is known the first ones.

    Attributes:
        ids: `[N]`, where each sample stands in its Dataset; None where it has none.

    Raises:
        HAMUValueError: If it cannot be read beside something else.
    """

    def __init__(self, source: Any, like: Any, most: int | None) -> None:
        is_loaded = isinstance(source, DataLoader) or not is_data(source)
        loader = source if is_loaded else load_like(source, like, batch_size=batch_size_of(like, BATCH_SIZE))
        positions = _find_positions(loader)
        self._loader, self._most, self._read = loader, most, 0
        self.ids: Tensor | None = None
        self._is_spread = positions is not None
        if positions is not None:
            size = batch_size_of(loader, BATCH_SIZE) or 1
            chosen = _spread(positions, size, most)
            self.ids, self._most = torch.tensor(chosen), None
            self._is_part = len(chosen) < len(positions)
            dataset: Any = loader.dataset
            is_all = chosen == [*range(len(dataset))]
            loader = load_like(dataset if is_all else Subset(dataset, chosen), loader, batch_size=size)
        self._batches = MeasuringLoader(loader)

    def __iter__(self) -> Iterator[Any]:
        self._read = 0
        for batch in islice(self._batches, self._most):
            self._read += 1
            yield batch
        self._batches.close()

    def singles(self, most: int | None = None) -> Iterable[Any] | None:
        """Each of the first samples in a batch of its own; None where they are in no Dataset."""
        return None if self.ids is None else one_by_one(self._loader, self.ids[:most].tolist())

    @property
    def is_whole(self) -> bool:
        """Whether the last reading was one of all samples, as far as it can be told."""
        if self._is_spread:
            return not self._is_part
        length = self._batches.length
        return self._read < (self._most or 1024) if length is None else self._read == length


def _find_positions(loader: Any) -> list[int] | None:
    """The positions in its Dataset that a loader reads, in order; None where they are not known."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if loader.batch_size is None and loader.batch_sampler is not None:  # batches of a sampler's own making
        return [*range(len(loader.dataset))]  # type: ignore[arg-type]
    return read_positions(loader)


def _spread(positions: list[int], size: int, most: int | None) -> list[int]:
    """The positions of so many batches at equal distances; of all for None."""
    n = -(-len(positions) // size)
    if most is None or n <= most:
        return positions
    numbers = [(2 * i + 1) * n // (2 * most) for i in range(most)]
    return [position for number in numbers for position in positions[number * size : (number + 1) * size]]


def check_part(name: str, source: Any) -> None:
    """Raise unless something holds samples or batches.

    Raises:
        HAMUValueError: Otherwise.
    """
    if isinstance(source, str | bytes | Tensor) or not (isinstance(source, Iterable) or is_data(source)):
        raise HAMUValueError(
            f"Expected the data of {name!r} to be a Dataset, a DataLoader or another iterable of batches, but got "
            f"{type(source).__name__}. Tensors become a Dataset by TensorDataset(x, y)."
        )
