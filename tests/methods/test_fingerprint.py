"""The same settings have the same name, others another."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from hamu_lightning.callbacks import HAMUCallback
from hamu_lightning.methods import SSD, TrainingRun
from hamu_lightning.methods._fingerprint import describe, fingerprint, hash_batches, hash_tensors
from hamu_lightning.rules import HAMUQ
from tests.methods.setups import make_samples


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


def run(quota: float) -> TrainingRun:
    return TrainingRun(lambda forget, seed: HAMUCallback(forget, HAMUQ(quota), seed=seed), {"max_epochs": 1})


def nested(value: int) -> Any:
    return lambda: [value + i for i in range(3)]


PAIRS: list[tuple[Any, Any, Any]] = [  # two that are the same, and one that is not
    (run(0.1), run(0.1), run(0.2)),
    (SSD(1.0), SSD(1.0), SSD(2.0)),
    (nested(1), nested(1), nested(2)),
    (lambda x: x + 1, lambda x: x + 1, lambda x: x + 2),
    (lambda x=1: x, lambda x=1: x, lambda x=2: x),
    (lambda x: x.sin(), lambda x: x.sin(), lambda x: x.cos()),
    (partial(nested, 1), partial(nested, 1), partial(nested, 2)),
    (partial(pow, 2), partial(pow, 2), partial(pow, 3)),
    (Plain(1), Plain(1), Plain(2)),
    (Plain([Plain(1)]), Plain([Plain(1)]), Plain([Plain(2)])),
    ({"a": torch.ones(2)}, {"a": torch.ones(2)}, {"a": torch.zeros(2)}),
    (torch.ones(2), torch.ones(2), torch.ones(2, 1)),
    ([1, 2], [1, 2], [[1], 2]),
]


@pytest.mark.parametrize(("one", "same", "other"), PAIRS)
def test_settings(one: Any, same: Any, other: Any) -> None:
    assert describe(one) == describe(same) != describe(other)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert "0x" not in describe(one)


def test_what_holds_itself() -> None:
    one, other = Plain(1), Plain(1)
    one.value, other.value = [one], [[other]]
    assert describe(one) == describe(one) != describe(other)

    def countdown(n: int) -> int:
        return countdown(n - 1) if n else 0

    assert "itself" in describe(countdown)


def test_data_count_by_their_content_and_not_by_their_batches_order_in_memory() -> None:
    one, same, other = make_samples(20), make_samples(20), make_samples(20)
    other.tensors[1][3] += 1
    hashes = [hash_batches(DataLoader(part, batch_size=8)) for part in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64])
def test_tensors_of_all_kinds(dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    assert hash_tensors([values]) == hash_tensors([values.clone()]) != hash_tensors([values.T.contiguous() * 0])
    assert hash_tensors([values[0].repeat(2)[::2]]) == hash_tensors([values[0].new_tensor([0, 0])])
    assert hash_tensors([values.T]) == hash_tensors([values.T.contiguous()])
    assert hash_tensors([torch.tensor(1).to(dtype)]) != hash_tensors([torch.tensor([1]).to(dtype)])
