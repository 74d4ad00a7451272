"""Masks that cannot be used, and how scores become a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.optim._mask import keep_largest
from hamu_lightning.rules import (
    HAMUQ,
    RelativeRadius,
)
from tests.optim.doors import RULE, make_model
from tests.optim.masks import wrap

BAD: dict[str, tuple[Any, str]] = {
    "no mapping": (torch.ones(2), "Expected `mask` to map names of weights to bool tensors, but got Tensor"),
    "unknown name": ({"3.weight": torch.ones(2)}, "or their names, but got '3.weight'. Pass"),
    "unknown tensor": ({nn.Parameter(torch.ones(2)): torch.ones(2)}, "or their names, but got 'Parameter'. Pass"),
    "floats": ({"0.bias": torch.ones(8)}, r"0.bias to be a bool tensor of shape \[8\], but got torch.float32, \[8\]"),
    "shape": ({"0.bias": torch.ones(1) > 0}, r"0.bias to be a bool tensor of shape \[8\], but got torch.bool, \[1\]"),
    "a number": ({"0.bias": True}, r"0.bias to be a bool tensor of shape \[8\], but got bool"),
}


@pytest.mark.parametrize("case", BAD)
def test_masks_that_do_not_fit_are_refused(case: str) -> None:
    mask, message = BAD[case]
    with pytest.raises(HAMUValueError, match=message):
        wrap(make_model(), mask=mask)


def test_a_mask_that_lets_nothing_move_is_refused() -> None:
    model = make_model()
    mask = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    with pytest.raises(HAMUValueError, match="Expected some weight inside of `mask`, but all rest"):
        wrap(model, mask=mask)


def test_a_relative_radius_needs_weights_inside_of_the_mask() -> None:
    weight = nn.Parameter(torch.tensor([0.0, 1.0]))
    with pytest.raises(HAMUValueError, match="Expected some weight to differ from zero"):
        HAMUOptimizer(
            SGD([weight], lr=0.1), HAMUQ(0.1, radius=RelativeRadius(0.1)), mask={weight: torch.tensor([True, False])}
        )


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    mask = {"weight": torch.eye(4, 2) > 0}
    optimizer = HAMUOptimizer(SGD(embedding.parameters(), lr=0.1), RULE, embedding.named_parameters(), mask=mask)
    for context in (optimizer.retain, optimizer.forget):
        with context():
            embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(HAMUStateError, match=r"dense gradients .* \[4, 2\] is sparse"):
        optimizer.step()


def test_sharded_weights_are_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.device_mesh = object()  # type: ignore[attr-defined]  # as a DTensor has one
    with pytest.raises(HAMUValueError, match="Expected whole tensors with `mask`"):
        HAMUOptimizer(SGD([weight], lr=0.1), RULE, mask={weight: torch.ones(2) > 0})


def test_the_largest_scores_are_kept() -> None:
    scores = {"a": torch.tensor([[0.0, 3.0], [1.0, 1.0]]), "b": torch.tensor([2.0, 1.0])}
    kept = {share: keep_largest(scores, share) for share in (1 / 3, 0.5, 1.0)}
    assert [int(sum(m.sum() for m in mask.values())) for mask in kept.values()] == [2, 3, 6]
    assert kept[1 / 3]["a"].tolist() == [[False, True], [False, False]]
    assert kept[0.5]["a"].tolist() == [[False, True], [True, False]]  # of equal ones the first
    assert kept[0.5]["b"].tolist() == [True, False]
    for keep in (0.0, 1.1):
        with pytest.raises(HAMUValueError, match=r"Expected `keep` to be a share in \(0, 1\]"):
            keep_largest(scores, keep)
    with pytest.raises(HAMUValueError, match="Expected finite gradients of the forget loss"):
        keep_largest({"a": torch.tensor([torch.nan])}, 0.5)
    with pytest.raises(HAMUValueError, match="Expected some parameter that requires grad"):
        keep_largest({}, 0.5)
