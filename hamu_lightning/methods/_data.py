"""Loaders: both sets together to train on them, and batches as the hooks of a datamodule hand them on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.loaders import BATCH_SIZE, batch_size_of, load_like, transfer_by_hooks
from hamu_lightning.methods._protocol import DataSource, Forget

_Source = TypeVar("_Source", bound=DataSource)


def hooked(source: DataSource, batches: Iterable[Any]) -> Iterable[Any]:
    """Return the batches as a LightningDataModule with transfer hooks of its own hands them on; others as they are."""
    names = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    is_plain = all(getattr(type(source), name, None) is getattr(LightningDataModule, name) for name in names)
    return batches if is_plain or not isinstance(source, LightningDataModule) else _Hooked(source, batches)


class _Hooked:
    def __init__(self, source: LightningDataModule, batches: Iterable[Any]) -> None:
        self._source, self._batches = source, batches

    def __iter__(self) -> Iterator[Any]:
        device = torch.device("cpu")
        return (transfer_by_hooks(self._source, batch, device) for batch in self._batches)


def joined(retain: Any, forget: Forget) -> DataLoader[Any]:
    """Return a shuffling loader of all training data: that of the retain loader and that to forget.

    Raises:
        HAMUValueError: If one of the two has no dataset with a length.
    """
    parts: list[Any] = [part.dataset if isinstance(part, DataLoader) else part for part in (retain, forget)]
    for name, part in zip(("the retain loader", "`forget`"), parts, strict=True):
        if not isinstance(part, Dataset) or isinstance(part, IterableDataset):
            raise HAMUValueError(
                f"Expected {name} to come from a Dataset with a length, but got {type(part).__name__}. The original is "
                "trained on both sets together: give a DataLoader over a map-style Dataset."
            )
    drop_last = getattr(retain, "drop_last", False)
    return load_like(
        ConcatDataset(parts), retain, batch_size=batch_size_of(retain, BATCH_SIZE), shuffle=True, drop_last=drop_last
    )


def with_train_loader(source: _Source, loader: Any) -> _Source:
    """Return a shallow copy of the source that trains on another loader."""
    copied = copy.copy(source)
    copied.train_dataloader = lambda: loader  # type: ignore[method-assign]
    return copied
