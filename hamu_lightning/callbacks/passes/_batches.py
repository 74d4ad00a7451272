"""What is in a batch: how many samples, and whether two batches are built alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from hamu_lightning.callbacks._refusal import HAMUMisconfigurationError
from hamu_lightning.errors import HAMUStateError

# Deeper than batches are; what refers to itself ends there.
_DEEPEST = 16


class BatchSizes:
    """How many samples each batch of a pass has, as far as its loader states it.

    Args:
        loader: Any loader. A DataLoader over a map-style Dataset states it; a batch sampler of one's own does not.
    """

    def __init__(self, loader: Any) -> None:
        sampler = getattr(loader, "batch_sampler", None) if isinstance(loader, DataLoader) else None
        self._size = self._total = 0
        # The sampler of an IterableDataset is endless, and has no length.
        if type(sampler) is BatchSampler and hasattr(sampler.sampler, "__len__"):
            self._size, self._total = sampler.batch_size, len(sampler.sampler)  # type: ignore[arg-type]

    def count(self, batch: Any, number: int) -> float:
        """Return the number of samples in a batch, the `number`th of a pass from 0; NaN where it cannot be told."""
        stated = min(self._size, self._total - number * self._size)
        return float(stated) if stated > 0 else count_samples(batch)


def count_samples(batch: Any) -> float:
    """Return the number of samples in a batch: the first dimension of its tensors, NaN unless they agree in it.

    Where its loader is known, `BatchSizes` counts better: in lists of images and in graphs tensors say nothing.
    """
    sizes = {tensor.shape[0] for _, tensor in _tensors(batch) if tensor.ndim}
    return float(sizes.pop() or math.nan) if len(sizes) == 1 else math.nan


def counted(loader: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Return the batches of a loader, each with the number of its samples (NaN where it cannot be told).

    Args:
        loader: A loader of any kind. One with an attribute `samples` tells the number of the present batch by it.
    """
    sizes = BatchSizes(loader)
    for number, batch in enumerate(loader):
        own = getattr(loader, "samples", None)
        yield batch, sizes.count(batch, number) if own is None else own


@contextmanager
def comparing(batch: Any, like: Any) -> Iterator[None]:
    """Explain, where a pass on a first batch fails, that it is not built like one of the training loader, or warn.

    Raises:
        HAMUMisconfigurationError: If all its tensors have one dimension less, or more; or if the pass fails on it.
    """
    check_is_batch(batch, like)
    what = f"but got {describe(batch)} beside {describe(like)}"
    try:
        yield
    except Exception as error:
        if is_alike(batch, like):
            raise
        raise HAMUMisconfigurationError(
            f"Expected the first forget batch to be built like a retain batch, {what}: `training_step` raised "
            f"{type(error).__name__}. A Dataset is loaded like the training data; in a loader of your own, use the "
            "training loader's `collate_fn`."
        ) from error
    kinds, expected = ({path: _kind(x) for path, x in _tensors(one)} for one in (batch, like))
    if any(kinds[path] != expected[path] for path in kinds.keys() & expected.keys()):
        rank_zero_warn(
            f"Forget batches should be built like retain batches, {what}. A Dataset is loaded like the training data; "
            "in a loader of your own, use the same transforms and `collate_fn`."
        )


def check_is_batch(batch: Any, like: Any) -> None:
    """Raise if all tensors of a batch have one dimension less, or more, than those of another one.

    Raises:
        HAMUMisconfigurationError: Then.
    """
    ranks, expected = ([(path, x.ndim) for path, x in _tensors(one)] for one in (batch, like))
    if not expected or [path for path, _ in ranks] != [path for path, _ in expected]:
        return
    steps = {rank - other for (_, rank), (_, other) in zip(ranks, expected, strict=True)}
    what, cure = "batches of batches", "What yields ready batches is given as DataLoader(dataset, batch_size=None)."
    if steps == {-1}:
        what, cure = "single samples", "Give the Dataset that they are from, or a DataLoader(samples, batch_size=...)."
    if steps in ({-1}, {1}):
        raise HAMUMisconfigurationError(
            f"Expected batches to forget, but got {what}: {describe(batch)} beside {describe(like)}. {cure}"
        )


def is_alike(batch: Any, like: Any) -> bool:
    """Whether two batches are built alike: the same containers, tensors with as many dimensions, of floats or not.

    Lists and tuples are the same; sizes may differ, and parts may be left out.
    """
    if isinstance(batch, Tensor) and isinstance(like, Tensor):
        return _kind(batch) == _kind(like)
    if isinstance(batch, Mapping) and isinstance(like, Mapping):
        common = batch.keys() & like.keys()
        return bool(common) and all(is_alike(batch[key], like[key]) for key in common)
    if isinstance(batch, list | tuple) and isinstance(like, list | tuple):
        return all(is_alike(a, b) for a, b in zip(batch, like, strict=False)) and bool(batch) == bool(like)
    return type(batch) is type(like) or batch is None or like is None


def describe(batch: Any) -> str:
    """Say in words how a batch is built, without its values."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(batch[key])}" for key in list(batch)[:8]) + "}"
    if isinstance(batch, list | tuple):
        more = ", ..." if len(batch) > 4 else ""
        return f"{type(batch).__name__}({', '.join(describe(part) for part in batch[:4])}{more})"
    return type(batch).__name__


def _kind(tensor: Tensor) -> tuple[int, bool]:
    return tensor.ndim, tensor.is_floating_point() or tensor.is_complex()


def _tensors(batch: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """The tensors in a batch, with the way to each."""
    if isinstance(batch, Tensor):
        yield path, batch
        return
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(batch, Mapping):
        parts = batch.items()
    elif isinstance(batch, list | tuple):
        parts = enumerate(batch)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        parts = vars(batch).items()
    for key, part in parts if len(path) < _DEEPEST else ():
        yield from _tensors(part, (*path, key))


def split_batch(batch: Any, groups: Sequence[str]) -> tuple[Any, ...]:
    """Split a training batch `{"retain": ..., "forget": ...}` into those of the groups.

    Raises:
        HAMUStateError: If one of them is missing, for instance because its loader has ended.
    """
    parts = tuple(batch.get(name) if isinstance(batch, Mapping) else None for name in groups)
    if any(part is None for part in parts):
        raise HAMUStateError(
            f"Expected each training batch to hold {' and '.join(map(repr, groups))}, but one of them is missing. "
            "Let the shorter loader cycle: CombinedLoader(..., mode='max_size_cycle')."
        )
    return parts
