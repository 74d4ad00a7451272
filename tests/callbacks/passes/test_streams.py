"""The forget stream: passes, random states, positions; and the split of a dataset."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from hamu_lightning.callbacks import split_forget
from hamu_lightning.callbacks.passes import ForgetStream
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.randomness import RandomStream


def take(stream: ForgetStream, random_stream: RandomStream, n: int) -> list[list[int]]:
    batches = []
    for _ in range(n):
        random_stream.draw += 1
        with random_stream.active():
            batches.append(next(stream)[0].tolist())
            torch.rand(3)  # a forward pass draws as well
    return batches


def make(loader: Any, seed: int = 0) -> tuple[ForgetStream, RandomStream]:
    random_stream = RandomStream(seed)
    return ForgetStream(loader, random_stream), random_stream


@pytest.mark.parametrize("generator", [None, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_pass_is_shuffled_anew_and_complete(generator: int | None, workers: int) -> None:
    """No replay of the first pass; 4 batches of 3 and a last one of 1."""
    own = None if generator is None else torch.Generator().manual_seed(generator)
    data = TensorDataset(torch.arange(13))
    loader = DataLoader(data, batch_size=3, shuffle=True, generator=own, num_workers=workers)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[union-attr]
    own_before = None if own is None else own.get_state()
    passes = take(*make(loader), 15)
    assert [len(b) for b in passes] == [3, 3, 3, 3, 1] * 3
    for start in (0, 5, 10):
        assert sorted(sum(passes[start : start + 5], [])) == list(range(13))
    assert passes[:5] != passes[5:10] != passes[10:]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[union-attr]
    assert own is None or torch.equal(own.get_state(), own_before)  # type: ignore[arg-type]
    assert passes == take(*make(loader), 15)
    assert passes != take(*make(loader, seed=1), 15)


class Augmenting(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return (torch.tensor([index + random.random(), float(np.random.rand()), float(torch.rand(()))]),)


class NoLength(IterableDataset[Any]):
    """Draws at its very end as well."""

    def __iter__(self) -> Iterator[Any]:
        yield from (Augmenting()[i] for i in torch.randperm(10).tolist())
        torch.rand(1)


@pytest.mark.parametrize("taken", [0, 2, 4, 7])
@pytest.mark.parametrize("dataset", [Augmenting(), NoLength()], ids=["sized", "without length"])
def test_position_and_random_state_resume(taken: int, dataset: Any) -> None:
    loader = DataLoader(dataset, batch_size=3, shuffle=None if isinstance(dataset, NoLength) else True)
    stream, random_stream = make(loader)
    take(stream, random_stream, taken)
    state = stream.state_dict()
    expected = take(stream, random_stream, 9)
    again, random_again = make(loader)
    again.load_state_dict(state)
    assert take(again, random_again, 9) == expected


def test_position_from_a_process_with_another_length() -> None:
    """Checkpoints hold the position of the first process; another one may have had fewer batches in a pass."""
    here, there = ([(torch.tensor([i]),) for i in range(n)] for n in (3, 5))
    stream, random_stream = make(here)
    other, other_random = make(there)
    take(stream, random_stream, 7), take(other, other_random, 7)
    again, random_again = make(here)
    again.load_state_dict(other.state_dict())
    assert take(again, random_again, 4) == take(stream, random_stream, 4) == [[1], [2], [0], [1]]


class EndsWithAnError:
    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Any]:
        yield from ((torch.tensor([i]),) for i in range(2))
        raise IndexError("the last sample was read")


def test_loaders_that_end_with_an_error_and_lists_of_batches() -> None:
    assert take(*make(EndsWithAnError()), 5) == [[0], [1], [0], [1], [0]]
    batches = [(torch.tensor([i]),) for i in range(2)]
    stream, random_stream = make(batches)
    with random_stream.active():
        for _ in range(3):
            next(stream)[0].add_(7)  # modules edit batches in place; the list must not notice
    assert [b[0].item() for b in batches] == [0, 1]


MASK = [False, True, False, True, False]


@pytest.mark.parametrize(
    ("indices", "positions"),
    [
        ([1, 3], [1, 3]),
        (range(2), [0, 1]),
        (torch.tensor([0, 4]), [0, 4]),
        (np.array([2]), [2]),
        ([np.int32(3), torch.tensor(1)], [1, 3]),
        (torch.tensor(MASK).nonzero(), [1, 3]),
        (MASK, [1, 3]),
        (np.array(MASK), [1, 3]),
        (torch.tensor(MASK), [1, 3]),
        (list(torch.tensor(MASK)), [1, 3]),
    ],
)
def test_split(indices: Any, positions: list[int]) -> None:
    retain, forget = split_forget(TensorDataset(torch.arange(5)), indices)
    assert sorted([*retain.indices, *forget.indices]) == list(range(5))
    assert forget.indices == positions


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([5], r"Expected `indices` to be in 0 .. 4, but got \[5\]"),
        ([-1], r"but got \[-1\]"),
        ([1, 1], "but 1 occur twice"),
        ([], "but got 0 of 5 to forget"),
        (range(5), "but got 5 of 5 to forget"),
        ([3.7], "each an integer, or a boolean mask .* but got float among them"),
        (np.array([3.0]), "but got float among them"),
        (["3"], "but got str among them"),
        ("12", "but got str"),
        (b"12", "but got bytes"),
        (3, "but got int"),
        (None, "but got NoneType"),
        (torch.tensor([[1, 2], [3, 4]]), r"but got Tensor of shape \[2, 2\]"),
        (TensorDataset(torch.arange(2)), "but got TensorDataset"),
        (MASK[:3], "but got 3 of True or False among 3 values for 5 samples"),
        ([True, 2, 3, 4, 0], "but got 1 of True or False among 5 values"),
    ],
)
def test_bad_splits(indices: Any, message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        split_forget(TensorDataset(torch.arange(5)), indices)


@pytest.mark.parametrize("dataset", [None, 3, iter([1, 2]), {1, 2}])
def test_split_needs_samples_by_position(dataset: Any) -> None:
    with pytest.raises(HAMUValueError, match="Expected `dataset` to be a Dataset with a length"):
        split_forget(dataset, [0])
