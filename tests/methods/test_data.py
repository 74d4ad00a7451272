"""Loaders: each sample once and in order, both sets together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hamu_lightning.callbacks.goals import one_by_one
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.loaders import in_order, own_generators
from hamu_lightning.methods._data import joined


def numbers(start: int, stop: int) -> TensorDataset:
    return TensorDataset(torch.arange(start, stop))


def read(loader: Any) -> list[int]:
    return [int(i) for (batch,) in loader for i in batch]


def test_each_sample_once_and_in_order() -> None:
    loader = DataLoader(numbers(0, 10), batch_size=4, shuffle=True, drop_last=True)
    found = in_order(loader)
    assert read(found) == list(range(10))
    assert len(next(iter(found))[0]) == 4
    assert read(in_order(numbers(3, 6), like=loader)) == [3, 4, 5]
    batches = [[torch.tensor([7, 1])]]
    assert in_order(batches) is batches


def test_a_loader_with_workers_can_be_read_without() -> None:
    loader = DataLoader(numbers(0, 5), batch_size=2, num_workers=1, persistent_workers=True)
    found = in_order(loader, num_workers=0)
    assert read(found) == [0, 1, 2, 3, 4] and not found.num_workers
    assert read(one_by_one(loader, [3, 1])) == [3, 1]


def test_batches_that_are_ready_stay_so() -> None:
    loader = DataLoader(numbers(0, 6).tensors[0].view(3, 2), batch_size=None)
    assert [batch.tolist() for batch in in_order(loader)] == [[0, 1], [2, 3], [4, 5]]


def test_both_sets_are_shuffled_together() -> None:
    retain = DataLoader(numbers(0, 10), batch_size=5, drop_last=True)
    for forget in (numbers(10, 13), DataLoader(numbers(10, 13), batch_size=1)):
        found = joined(retain, forget)
        passes = [read(found), read(found)]
        # Three batches of five would need fifteen samples.
        assert [len(one) for one in passes] == [10, 10]
        assert passes[0] != passes[1]
        assert set(passes[0] + passes[1] + read(found) + read(found)) == set(range(13))


def test_a_stream_cannot_be_joined() -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter([])

    with pytest.raises(HAMUValueError, match="Expected the retain loader to come from a Dataset with a length"):
        joined(DataLoader(Stream()), numbers(0, 1))


def test_generators_of_loader_and_sampler_are_found_once() -> None:
    generator = torch.Generator()
    assert own_generators(DataLoader(numbers(0, 3), shuffle=True, generator=generator)) == [generator]
    assert own_generators(DataLoader(numbers(0, 3))) == []
