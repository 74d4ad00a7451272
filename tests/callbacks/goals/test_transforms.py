"""Forget and held-out samples under the same transforms, or a warning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from hamu_lightning import Holdout
from hamu_lightning.callbacks.goals._transforms import explain_difference, with_transforms_of
from hamu_lightning.errors import HAMUValueError


class Points(Dataset[Any]):
    def __init__(self, transform: Any = None, n: int = 6) -> None:
        self.x, self.transform = torch.arange(float(n)), transform

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index] if self.transform is None else self.transform(self.x[index])


class Hidden(Points):
    """Augments without an attribute that says so."""

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index] + torch.rand(())


def double(x: Tensor) -> Tensor:
    return 2 * x


def jitter(x: Tensor) -> Tensor:
    return x + torch.rand(())


@pytest.mark.parametrize(
    ("forget", "held_out", "words"),
    [
        (Points(jitter), Points(), "different transforms"),
        (DataLoader(Subset(Points(jitter), [1, 2])), ConcatDataset([Points(double), Points(double)]), "different"),
        (Points(jitter), DataLoader(Points(jitter)), ""),  # on both sides
        (Points(), Points(), ""),
        (Hidden(), TensorDataset(torch.zeros(4)), "A sample of the forget set gives other tensors at each reading"),
        (TensorDataset(torch.zeros(4)), Hidden(), "A sample of the held-out data gives other tensors"),
        (Hidden(), Hidden(), ""),
        (TensorDataset(torch.zeros(4)), [torch.zeros(2)], ""),
    ],
)
def test_different_transforms_are_seen(forget: Any, held_out: Any, words: str) -> None:
    before = torch.get_rng_state()
    found = explain_difference(forget, held_out)
    assert bool(found) == bool(words) and words in found
    assert "transform_like" in found or not words
    assert torch.equal(before, torch.get_rng_state())


def test_a_view_under_other_transforms_shares_the_samples() -> None:
    base = Points(double)
    parts = ConcatDataset([Subset(base, [1, 3]), base])
    view = with_transforms_of(DataLoader(parts, batch_size=8), Subset(Points(lambda x: x + 100), [0]))
    assert next(iter(view)).tolist() == [101, 103, 100, 101, 102, 103, 104, 105]
    assert base.transform is double and base[1] == 2
    assert view.dataset.datasets[1].x is base.x


@pytest.mark.parametrize(
    ("data", "like", "which"),
    [
        (TensorDataset(torch.zeros(3)), Points(), "held-out data"),
        (Points(), TensorDataset(torch.zeros(3)), "forget set"),
        (Points(), ConcatDataset([Points(double), Points(jitter)]), "forget set"),
    ],
)
def test_what_has_no_transform_is_refused(data: Any, like: Any, which: str) -> None:
    with pytest.raises(HAMUValueError, match=f"that of the {which} has none, or several"):
        with_transforms_of(data, like)


def test_transform_like_is_checked() -> None:
    with pytest.raises(HAMUValueError, match="Expected `transform_like` to be"):
        Holdout(Points(), transform_like="retain")  # type: ignore[arg-type]
