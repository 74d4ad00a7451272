"""The same samples at each reading: a fixed excerpt of a loader that others read as well."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler, Subset

from hamu_lightning.callbacks.passes import MeasuringLoader, twin_loader
from hamu_lightning.loaders import load_like

# Samplers that go through all of the dataset, which need not be asked for an order.
_WHOLE = (SequentialSampler, RandomSampler, DistributedSampler)
# From a sampler of another kind at most so many indices are taken.
_LONGEST_PASS = 1_000_000
# Batches of a loader whose samples nobody can count.
_MOST_BATCHES = 32


def choose_place(loader: Any, samples: int, seed: int, per_batch: float) -> dict[str, Any]:
    """Choose an excerpt of a loader, in numbers that a checkpoint can hold.

    Samples of a map-style Dataset are drawn at random among those that the loader's sampler gives. Of any other loader
    batches are taken, at equal distances in a pass.

    Args:
        loader: A loader of any kind.
        samples: How many, at most.
        seed: Of the draw.
        per_batch: How many samples one of its batches has; NaN where nobody knows.
    """
    positions = choose_positions(loader, samples, seed)
    if positions is not None:
        return {"positions": positions}
    # One that knows its place in the data will be at another one when the run goes on.
    knows = all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))
    state = {"state": copy.deepcopy(loader.state_dict())} if knows else {}
    return {"batches": count_batches(samples, per_batch), **state}


def open_excerpt(loader: Any, place: Mapping[str, Any]) -> MeasuringLoader:
    """Read an excerpt beside the passes under way; the same at each reading under the same random numbers.

    Args:
        loader: The loader.
        place: What `choose_place` returned.

    Raises:
        HAMUValueError: If the loader cannot be read beside a pass that is under way.
    """
    if "positions" not in place:
        if "state" in place:
            loader = twin_loader(loader)
            loader.load_state_dict(copy.deepcopy(place["state"]))
        return MeasuringLoader(loader, most=place["batches"])
    chosen = Subset(loader.dataset, place["positions"])
    return MeasuringLoader(load_like(chosen, loader, batch_size=loader.batch_size))


def choose_positions(loader: Any, samples: int, seed: int) -> list[int] | None:
    """Draw positions in the Dataset behind a loader, among those that it reads; None where it has no positions.

    Args:
        loader: A loader of any kind.
        samples: How many, at most.
        seed: Of the draw.

    Example:
        >>> len(choose_positions(DataLoader(range(100), batch_size=4, shuffle=True), 10, seed=0))
        10
        >>> choose_positions([1, 2], 10, seed=0)
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return None
    known: Any = range(len(loader.dataset))  # type: ignore[arg-type]
    if type(loader.sampler) not in _WHOLE:
        known = [*dict.fromkeys(islice(twin_loader(loader).sampler, _LONGEST_PASS))]
        if not all(isinstance(position, int) for position in known):
            return None
    drawn = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed % 2**63))[:samples]
    return sorted(known[i] for i in drawn.tolist())


def count_batches(samples: int, per_batch: float) -> int:
    """How many batches hold so many samples; a fixed number where nobody knows how many a batch has."""
    return max(1, math.ceil(samples / per_batch)) if math.isfinite(per_batch) else _MOST_BATCHES
