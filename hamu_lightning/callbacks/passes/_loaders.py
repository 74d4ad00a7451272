"""A loader's twin, to be read beside it, and copies of its batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from hamu_lightning.callbacks import _compat
from hamu_lightning.errors import HAMUValueError


def twin_loader(loader: Any) -> Any:
    """A loader that can be iterated beside this one: a DataLoader's copy, with samplers and generators of its own.

    Raises:
        HAMUValueError: If the loader is used up by iterating it.
    """
    if isinstance(loader, Iterator):
        raise HAMUValueError(
            f"Expected a loader that can be iterated again, but got a {type(loader).__name__}, which can be iterated "
            "only once: the preflight would take its batches away. Give a DataLoader or a list."
        )
    if isinstance(loader, _compat.CombinedBatches):
        return loader.twin(twin_loader)
    if not isinstance(loader, DataLoader):
        return loader
    twin = copy.copy(loader)
    memo: dict[int, Any] = {id(loader.dataset): loader.dataset}
    names = ("sampler", "batch_sampler", "generator")
    # Not by assignment, which DataLoader forbids. Persistent workers belong to the first one's iterator.
    twin.__dict__.update({name: _deep_copied(getattr(loader, name), memo) for name in names}, _iterator=None)
    return twin


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
