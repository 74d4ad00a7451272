"""The project's own training loader, over what is retained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from hamu_lightning import UnlearnData
from hamu_lightning.errors import HAMUValueError

DATA = TensorDataset(torch.arange(10))
KEPT = [0, 1, 2, 4, 5, 6, 7, 9]


def read(loader: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


def retained(loader: Any, **options: Any) -> Any:
    return UnlearnData(loader, [3, 8], **options).train_dataloader()


class Odd(DataLoader[Any]):
    """A loader of a project's own."""


def collate(samples: list[Any]) -> list[Any]:
    return [torch.stack([sample[0] for sample in samples])]


def test_the_retain_loader_has_the_settings_of_the_projects() -> None:
    generator = torch.Generator()
    options: dict[str, Any] = {"num_workers": 2, "prefetch_factor": 3, "persistent_workers": True, "timeout": 5}
    options |= {"collate_fn": collate, "pin_memory": True, "generator": generator, "in_order": False}
    mine = retained(Odd(DATA, batch_size=3, shuffle=True, drop_last=True, **options))
    assert type(mine) is Odd
    assert {name: getattr(mine, name) for name in options} == options
    assert (mine.batch_size, mine.drop_last, len(mine)) == (3, True, 2)
    assert isinstance(mine.sampler, RandomSampler)
    assert mine.sampler.generator is generator


def test_the_order_of_the_data_stays() -> None:
    assert read(retained(DataLoader(DATA, batch_size=3))) == [[0, 1, 2], [4, 5, 6], [7, 9]]
    assert read(retained(DataLoader(DATA, batch_size=3, drop_last=True))) == [[0, 1, 2], [4, 5, 6]]
    batches = BatchSampler(SequentialSampler(DATA), 4, drop_last=False)
    assert read(retained(DataLoader(DATA, batch_sampler=batches))) == [[0, 1, 2, 4], [5, 6, 7, 9]]
    assert read(retained(DataLoader(DATA, batch_size=None)))[3] == 4  # type: ignore[comparison-overlap]


def test_a_dataset_is_shuffled() -> None:
    assert retained(DATA, batch_size=3).batch_size == 3
    assert sorted(sum(read(retained(DATA, batch_size=3)), [])) == KEPT


@pytest.mark.parametrize(
    ("sampler", "seen"),
    [
        (RandomSampler(DATA), {*KEPT}),
        (RandomSampler(DATA, replacement=True, num_samples=200), {*KEPT}),
        (SubsetRandomSampler([1, 3, 5, 9]), {1, 5, 9}),
        (WeightedRandomSampler([0, 0, 0, 1, 0, 0, 1, 0, 1, 0], 10), {6}),
        (DistributedSampler(DATA, num_replicas=2, rank=1, shuffle=False), {*KEPT[1::2]}),
    ],
)
def test_samplers_of_torch_are_made_for_the_part(sampler: Any, seen: set[int]) -> None:
    loader = retained(DataLoader(DATA, batch_size=4, sampler=sampler))
    assert type(loader.sampler) is type(sampler)
    assert {*sum(read(loader), [])} == seen


@pytest.mark.parametrize(
    ("sampler", "seen"),
    [
        (SequentialSampler(range(5)), [0, 1, 2, 4]),
        (RandomSampler(range(5)), [0, 1, 2, 4]),
        (WeightedRandomSampler([1.0, 0, 1, 1, 1], 5, replacement=False), [0, 2, 4]),
    ],
)
def test_what_a_sampler_leaves_out_is_not_trained_on_now(sampler: Any, seen: list[int]) -> None:
    assert sorted(sum(read(retained(DataLoader(DATA, batch_size=4, sampler=sampler))), [])) == seen


@pytest.mark.parametrize(
    "sampler",
    [
        SubsetRandomSampler([3, 8]),
        WeightedRandomSampler([0, 0, 0, 1, 0, 0, 0, 0, 1, 0], 10),
    ],
)
def test_a_sampler_that_draws_nothing_of_what_is_retained_is_refused(sampler: Any) -> None:
    with pytest.raises(HAMUValueError, match="Expected the sampler of the training loader to draw some"):
        retained(DataLoader(DATA, batch_size=4, sampler=sampler))


@pytest.mark.parametrize(
    "sampler", [RandomSampler(range(5), replacement=True), DistributedSampler(TensorDataset(torch.arange(5)), 2, 0)]
)
def test_others_over_a_part_are_refused(sampler: Any) -> None:
    with pytest.raises(HAMUValueError, match="Expected a `sampler` of torch's own"):
        retained(DataLoader(DATA, batch_size=4, sampler=sampler))


class Own(Sampler[int]):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Any:
        return iter(range(len(self.data)))


class OwnBatches(BatchSampler):
    pass


def test_other_samplers_are_refused_by_name() -> None:
    loader = DataLoader(DATA, batch_size=2, sampler=Own(DATA))
    with pytest.raises(
        HAMUValueError, match=r"Expected a `sampler` of torch's own .* but got Own\. .*make_loader=lambda"
    ):
        retained(loader)
    batches = OwnBatches(SequentialSampler(DATA), 2, False)
    with pytest.raises(HAMUValueError, match="Expected a `batch_sampler` .* but got OwnBatches"):
        retained(DataLoader(DATA, batch_sampler=batches))
    made = retained(loader, make_loader=lambda part: DataLoader(part, batch_size=4, sampler=Own(part)))
    assert read(made) == [KEPT[:4], KEPT[4:]]


def test_several_training_loaders_are_refused() -> None:
    class Two(LightningDataModule):
        def train_dataloader(self) -> Any:
            return {"a": DataLoader(DATA), "b": DataLoader(DATA)}

    with pytest.raises(HAMUValueError, match=r"one DataLoader for training, but `train_dataloader\(\)` gives dict"):
        UnlearnData(Two(), [1]).train_dataloader()


def test_the_forget_loader_is_one_batch_or_equal_ones() -> None:
    data = TensorDataset(torch.arange(700))
    loader = DataLoader(data, batch_size=32)
    assert UnlearnData(loader, range(200)).forget_dataloader().batch_size == 200
    assert UnlearnData(loader, range(600)).forget_dataloader().batch_size == 200
    small = UnlearnData(loader, range(600), forget_batch_size=50).forget_dataloader()
    assert small.batch_size == 50
    assert isinstance(small.sampler, RandomSampler)


def test_held_out_samples_are_not_trained_on() -> None:
    data = UnlearnData(DataLoader(DATA, batch_size=3), [3, 8], holdout=[0, 1])
    assert read(data.train_dataloader()) == [[2, 4, 5], [6, 7, 9]]
    assert read(data.holdout_dataloader()) == read(data.val_dataloader()) == [[0, 1]]
    other = TensorDataset(torch.arange(50, 55))
    assert read(UnlearnData(DataLoader(DATA, batch_size=3), [3], holdout=other).holdout_dataloader())[1] == [53, 54]
