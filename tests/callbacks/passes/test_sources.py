"""What is given as data to forget, how it is loaded, how its batches are counted, copied and compared."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from hamu_lightning import HAMUCallback
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.callbacks.passes import ForgetStream, copied
from hamu_lightning.callbacks.passes._batches import BatchSizes, comparing, count_samples, counted
from hamu_lightning.errors import HAMUError
from hamu_lightning.loaders import load_like, set_epoch
from hamu_lightning.randomness import RandomStream
from tests.callbacks.modules import Base, WithBatchNorm, build, fit, make_data
from tests.callbacks.setups import RULE

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


class Indexed:
    """Data without torch's base class; it can also be iterated, sample by sample."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return make_data(20)[index] if index < 20 else [][0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(20))


class Seen(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        SHAPES.append(tuple(batch[0].shape))
        return super().training_step(batch, batch_idx)


SHAPES: list[tuple[int, ...]] = []


class Batches(IterableDataset[Any]):
    """Yields ready batches, as pipelines of shards do."""

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(make_data(32), batch_size=8))


@pytest.mark.parametrize(
    ("forget", "loader", "sizes"),
    [(Indexed(), None, {16, 4}), (Batches(), DataLoader(Batches(), batch_size=None), {8})],
    ids=["indexed", "ready batches"],
)
def test_data_are_loaded_like_the_training_data(forget: Any, loader: Any, sizes: set[int]) -> None:
    SHAPES.clear()
    callback = HAMUCallback(forget, RULE)
    fit(build(Seen), callback, loader=loader, max_epochs=1, limit_train_batches=3)
    assert callback.combined_steps == 3
    assert {shape[0] for shape in SHAPES[::2]} <= sizes
    assert {len(shape) for shape in SHAPES} == {2}


DATA = make_data(8)


@pytest.mark.filterwarnings("ignore:The fit has ended before the target")
@pytest.mark.parametrize(("samples", "asked", "size"), [(40, None, 40), (300, None, 150), (257, None, 129), (40, 7, 7)])
def test_with_a_target_forget_batches_are_large_and_equal(samples: int, asked: int | None, size: int) -> None:
    SHAPES.clear()
    passes = PassOptions(batch_size=asked)
    hamu = HAMUCallback(make_data(samples, seed=9), target=9.0, verify=False, passes=passes)
    fit(build(Seen), hamu, max_steps=1)
    assert {shape[0] for shape in SHAPES if shape[0] not in (16, samples % size)} == {size}


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ("forget.csv", "but got str. Load what it names"),
        (DATA.tensors[0], "but got Tensor. Tensors become a Dataset"),
        (iter([1]), "but got list_iterator. What is used up"),
        (zip(*DATA.tensors, strict=True), "but got zip. What is used up"),
        (TensorDataset, "but got type. Give the loader itself"),
        ([DATA[i] for i in range(8)], "got single samples"),
        (DataLoader(Batches(), batch_size=2), r"got batches of batches.*batch_size=None"),
        (DATA.tensors, r"but got float32\[8, 10\] beside list\(float32\[16, 10\], int64\[16\]\)"),
        ([3, 7], "but got int beside list"),
    ],
)
def test_what_holds_no_batches_is_refused_before_the_first_step(forget: Any, message: str) -> None:
    passes = 0
    with pytest.raises(HAMUError, match=message):
        callback = HAMUCallback(forget, RULE)
        try:
            fit(build(Base), callback)
        finally:
            passes = callback.forget_passes
    assert passes == 0


def test_a_remainder_of_one_under_batchnorm() -> None:
    callback = HAMUCallback(make_data(17), RULE, passes=PassOptions(batchnorm="retain"))
    with pytest.raises(HAMUError, match=r"one has a single sample. Set PassOptions\(batchnorm='freeze'\).*drop_last"):
        fit(build(WithBatchNorm), callback)


def prepare(_: int) -> None:
    pass


class Shifted(DataLoader[Any]):
    """A loader that does more; its constructor takes no options."""

    def __init__(self, data: Any, by: int) -> None:
        super().__init__(data, batch_size=3)
        self.by = by

    def __iter__(self) -> Any:
        return (batch + self.by for batch in super().__iter__())


def test_what_a_loader_has_in_common_with_another_one() -> None:
    options = {"worker_init_fn": prepare, "timeout": 7, "persistent_workers": True, "prefetch_factor": 4}
    like = DataLoader(range(9), num_workers=1, drop_last=True, generator=torch.Generator(), **options)  # type: ignore[arg-type]
    made = load_like(range(4), like, batch_size=3, shuffle=True)
    assert {name: getattr(made, name) for name in options} == options
    assert made.generator is None
    assert [len(indices) for indices in made.batch_sampler] == [3, 1]
    assert [batch.tolist() for batch in load_like(range(4), Shifted(range(9), 10), batch_size=2)] == [
        [10, 11],
        [12, 13],
    ]


class Named(Dataset[Any]):
    """Samples beside which counting goes wrong: names, and boxes of their own number."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return {"x": torch.ones(3), "name": "a name", "boxes": torch.ones(index + 1, 4)}


def listed(samples: list[Any]) -> dict[str, list[Any]]:
    return {key: [sample[key] for sample in samples] for key in samples[0]}


@pytest.mark.parametrize("drop_last", [False, True])
def test_counts_are_those_of_the_loader(drop_last: bool) -> None:
    loader = DataLoader(Named(), batch_size=4, collate_fn=listed, drop_last=drop_last)
    assert [count for _, count in counted(loader)] == [4, 4, 2][: 2 + (not drop_last)]
    stream = ForgetStream(loader, RandomStream(0))
    counts = [stream.samples for _ in range(4) if next(stream)]
    assert counts == ([4, 4, 4, 4] if drop_last else [4, 4, 2, 4])


def test_counts_without_a_loader_are_those_of_tensors_that_agree() -> None:
    assert count_samples({"x": torch.ones(5, 2), "id": "seven77", "y": (torch.ones(5), torch.tensor(3.0))}) == 5
    assert math.isnan(count_samples([torch.ones(3, 4), torch.ones(2)]))
    assert math.isnan(count_samples(["seven77"]))
    own = DataLoader(range(9), batch_sampler=[[0], [1, 2]])
    assert [count for _, count in counted(own)] == [1, 2]
    assert BatchSizes(DataLoader(Batches(), batch_size=None)).count(torch.ones(6), 0) == 6


class Epochs:
    """Wants to know which pass begins."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)


class EpochSampler(Epochs, SequentialSampler):
    def __init__(self) -> None:
        super().__init__()
        SequentialSampler.__init__(self, range(3))


class EpochBatches(Epochs, BatchSampler):
    def __init__(self, sampler: Any) -> None:
        super().__init__()
        BatchSampler.__init__(self, sampler, 2, drop_last=False)


class EpochRows(Epochs, IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(torch.arange(3))


def test_all_that_asks_is_told_the_pass() -> None:
    sampler = EpochSampler()
    batches = EpochBatches(sampler)
    stream = ForgetStream(DataLoader(range(3), batch_sampler=batches), RandomStream(0))
    [next(stream) for _ in range(3)]
    assert sampler.told == batches.told == [0, 1]
    rows = EpochRows()
    set_epoch(DataLoader(rows), 5)
    assert rows.told == [5]


class Shards(IterableDataset[Any]):
    """Each worker has rows of its own; with remainders there are more batches than the length says."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        yield from range(worker.id, 10, worker.num_workers)


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_a_pass_ends_where_its_data_end() -> None:
    stream = ForgetStream(DataLoader(Shards(), batch_size=4, num_workers=2), RandomStream(0))
    assert stream.length == 3
    assert sorted(sum((next(stream).tolist() for _ in range(4)), [])) == list(range(10))
    assert stream.state_dict()["pass"] == 1


class Refuses(Tensor):
    def __deepcopy__(self, memo: Any) -> Any:
        raise AttributeError("meta")


class Item:
    def __init__(self) -> None:
        self.x, self.lock = torch.ones(2), threading.Lock()


def test_copies_of_what_cannot_be_copied_as_a_whole() -> None:
    lock, own = threading.Lock(), torch.ones(2).as_subclass(Refuses)
    cyclic: list[Any] = [torch.ones(2), (i for i in range(3))]
    cyclic.append(cyclic)
    for batch in ([own, lock], {"x": own, "lines": (i for i in "ab")}, (torch.ones(2), own), Item(), cyclic):
        twin = copied(batch)
        assert type(twin) is type(batch)
        first, other = (b.x if isinstance(b, Item) else b["x"] if isinstance(b, dict) else b[0] for b in (batch, twin))
        assert type(other) is type(first)
        other.zero_()
        assert first.tolist() == [1, 1]
    assert copied([own, lock])[1] is lock
    assert copied(lock) is lock


def test_batches_that_may_differ() -> None:
    """Neither lists for tuples, nor lengths of sequences, nor optional keys raise a warning, which were an error."""
    one, two, labels = torch.ones(4, 7), torch.ones(2, 9), torch.ones(4).long()
    for batch, like in (((one, labels), [two, labels]), ({"x": one, "id": "a"}, {"x": two, "y": 3}), (one, {"a": one})):
        with comparing(batch, like):
            pass
    with pytest.warns(UserWarning, match=r"but got uint8\[4, 7\] beside float32\[2, 9\]"), comparing(one.byte(), two):
        pass
