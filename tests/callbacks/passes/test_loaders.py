"""Loaders that are read beside a pass under way: twins, and workers that stay."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from hamu_lightning import HAMUCallback
from hamu_lightning.callbacks.passes import MeasuringLoader
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.randomness import RandomStream
from tests.callbacks.modules import Base, build, fit, make_data
from tests.callbacks.setups import RULE


class Noisy(Dataset[Any]):
    """Draws for each sample, as augmentations do."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([index, float(torch.rand(()))])


class Rows(IterableDataset[Any]):
    """Remembers its place, so that a second reader would find it moved."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        while self.place < 12:
            self.place += 1
            yield torch.tensor([self.place - 1.0])
        self.place = 0


def read(loader: MeasuringLoader, draw: int, most: int | None = None) -> list[Any]:
    random = RandomStream(0)
    random.draw = draw
    with random.active():
        return [batch.tolist() for batch in loader.batches(most)]


def test_workers_stay_and_draw_anew() -> None:
    """What a pass draws depends on its random numbers alone: neither on earlier passes nor on what was left unread."""
    before = set(multiprocessing.active_children())
    loader = MeasuringLoader(DataLoader(Noisy(), 3, shuffle=True, num_workers=2))
    first = read(loader, 1)
    workers = set(multiprocessing.active_children()) - before
    next(iter(loader))
    second, again = read(loader, 2), read(loader, 1)
    assert set(multiprocessing.active_children()) - before == workers
    assert len(workers) == 2
    assert again == first != second
    loader.close()
    assert set(multiprocessing.active_children()) == before
    fresh = MeasuringLoader(DataLoader(Noisy(), 3, shuffle=True, num_workers=2))
    assert read(fresh, 2) == second
    fresh.close()


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_no_worker_outlives_the_fit() -> None:
    before = set(multiprocessing.active_children())
    forget = DataLoader(make_data(40, seed=9), batch_size=16, num_workers=1, persistent_workers=True)
    fit(build(Base), HAMUCallback(forget, RULE), max_epochs=1, limit_train_batches=2)
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_own_generators_are_left_alone(workers: int) -> None:
    generator = torch.Generator().manual_seed(3)
    loader = MeasuringLoader(DataLoader(Noisy(), 3, shuffle=True, generator=generator, num_workers=workers))
    state = generator.get_state()
    first, second = ([[i for i, _ in batch] for batch in read(loader, draw)] for draw in (1, 2))
    loader.close()
    assert first == second
    assert torch.equal(generator.get_state(), state)


def test_a_part_is_spread_over_the_pass() -> None:
    """Sorted data would show their beginning only."""
    data = TensorDataset(torch.arange(100))
    loader = DataLoader(data, batch_size=10)
    for given in (loader, list(loader)):
        some = [int(x[0]) // 10 for (x,) in MeasuringLoader(given).batches(3)]
        assert some == [1, 5, 8]
        assert len(list(MeasuringLoader(given).batches())) == len(list(MeasuringLoader(given).batches(20))) == 10


@pytest.mark.parametrize("make", [Rows, lambda: DataLoader(Rows(), batch_size=4)])
def test_a_stream_keeps_its_place(make: Any) -> None:
    stream = make()
    loader = MeasuringLoader(stream)
    iterator = iter(stream)
    rows = [next(iterator)]
    next(loader.batches())
    assert len(torch.cat(list(loader.batches()))) == 12
    assert sum(len(row) for row in [*rows, *iterator]) == 12


class Holds(IterableDataset[Any]):
    def __init__(self) -> None:
        self.source = (torch.tensor([i]) for i in range(3))

    def __iter__(self) -> Iterator[Any]:
        yield from self.source


@pytest.mark.parametrize(
    ("loader", "message"),
    [(iter([1]), "iterated only once"), (Holds(), "cannot be copied"), (DataLoader(Holds()), "cannot be copied")],
)
def test_what_cannot_be_read_beside_is_refused(loader: Any, message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        MeasuringLoader(loader)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return map(torch.tensor, count())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_without_an_end_is_read_up_to_a_limit(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr("hamu_lightning.callbacks.passes._loaders._MOST_OF_A_STREAM", 3)
    loader = MeasuringLoader(DataLoader(Endless(), 1, num_workers=workers))
    with pytest.warns(UserWarning, match="more than 3 batches: what is measured on it is measured on those"):
        assert read(loader, 1) == [[0], [1], [2]]
    loader.close()


def test_a_stream_with_an_end_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hamu_lightning.callbacks.passes._loaders._MOST_OF_A_STREAM", 12)
    assert len(read(MeasuringLoader(DataLoader(Rows(), 1)), 1)) == 12
