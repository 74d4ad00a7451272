"""What is known of a loader: a twin to read beside it, its options, its generators; and copies of its batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
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


def loader_options(like: Any) -> dict[str, Any]:
    """What a loader over other data has in common with this one, besides the batch size; of others nothing is known."""
    names = ("num_workers", "collate_fn", "pin_memory")
    return {name: getattr(like, name) for name in names} if isinstance(like, DataLoader) else {}


def own_generators(loader: object) -> list[torch.Generator]:
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
