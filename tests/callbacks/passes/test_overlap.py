"""Samples that two loaders share are seen through what stands between a loader and its data."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    random_split,
)

from hamu_lightning.callbacks.passes import count_shared_samples

BASE, OTHER = TensorDataset(torch.arange(60), torch.arange(60)), TensorDataset(torch.arange(30))
HALVES = random_split(BASE, [40, 20], generator=torch.Generator().manual_seed(0))


class Transformed(Dataset[Any]):
    def __init__(self, data: Any, factor: int = 1) -> None:
        self.data, self.factor = data, factor

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index][0] * self.factor


class Folder(Dataset[Any]):
    def __init__(self, root: str, train: bool = True) -> None:
        self.root, self.train = root, train

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


FIRST = Subset(BASE, range(10))
PAIRS = {
    "the dataset": (BASE, FIRST, 10),
    "subset of a subset": (Subset(Subset(BASE, range(40)), range(5, 30)), FIRST, 5),
    "negative indices": (Subset(BASE, [-60, -1]), FIRST, 1),
    "parts of a split": (HALVES[0], HALVES[1], 0),
    "one part of a split": (HALVES[0], BASE, 40),
    "concatenation": (ConcatDataset([OTHER, BASE]), FIRST, 10),
    "twice in a concatenation": (FIRST + Subset(BASE, range(5)), BASE, 10),
    "subset of a concatenation": (Subset(ConcatDataset([OTHER, BASE]), range(35)), FIRST, 5),
    "the other part of a concatenation": (Subset(ConcatDataset([OTHER, BASE]), range(30)), FIRST, 0),
    "two wrappers": (Transformed(BASE), Subset(Transformed(BASE, 2), range(10)), 10),
    "the same tensors": (TensorDataset(*BASE.tensors), FIRST, 10),
    "rows of the same tensors": (TensorDataset(BASE.tensors[0][8:]), FIRST, 2),
    "other tensors": (TensorDataset(BASE.tensors[0].clone()), FIRST, 0),
    "one folder": (Folder("a"), Subset(Folder("a"), [1, 2]), 2),
    "two folders": (Folder("a"), Folder("b"), 0),
    "two parts of a folder": (Folder("a"), Folder("a", train=False), 0),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_two_datasets_share(name: str) -> None:
    a, b, shared = PAIRS[name]
    assert count_shared_samples(DataLoader(a), DataLoader(b)) == shared
    assert count_shared_samples(b, a) == shared


def test_samplers() -> None:
    forget = DataLoader(BASE, sampler=SubsetRandomSampler(range(10)))
    assert count_shared_samples(DataLoader(BASE, sampler=SubsetRandomSampler(range(8, 60))), forget) == 2
    batches = DataLoader(BASE, batch_sampler=BatchSampler(SubsetRandomSampler(range(8, 60)), 4, drop_last=False))
    assert count_shared_samples(batches, forget) == 2
    assert count_shared_samples({"a": DataLoader(OTHER), "b": DataLoader(BASE, shuffle=True)}, forget) == 10
    assert count_shared_samples([DataLoader(OTHER), DataLoader(BASE)], forget) == 10


def test_what_is_not_known_is_not_said() -> None:
    class Odd:
        def __iter__(self) -> Any:
            return iter([1, 2])

    assert count_shared_samples(DataLoader(BASE, sampler=Odd()), FIRST) == 0
    assert count_shared_samples([(torch.ones(1),)], [(torch.ones(1),)]) == 0
    assert count_shared_samples(DataLoader([1, 2]), DataLoader([1, 2])) == 0


def test_large_sets_take_little_memory() -> None:
    """One byte for each row of the data, and the indices once more where they are no range."""
    data = Transformed(range(2_000_000))
    chosen = Subset(data, torch.arange(0, 2_000_000, 2).numpy())
    tracemalloc.start()
    assert count_shared_samples(data, chosen) == 1_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000 * 3 + 1_000_000 * 8 * 3
