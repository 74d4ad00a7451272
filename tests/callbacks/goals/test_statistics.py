"""What counts as remembered, and ratios of means with intervals, against loops and normal theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hamu_lightning.callbacks.goals._statistics import (
    draw_means,
    estimate_auc,
    estimate_ratio,
    looks_remembered,
    tell,
)
from hamu_lightning.metrics.functional import Estimate


def normal(n: int, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    return mean + torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_draws_in_pieces_are_of_the_same_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(50)
    monkeypatch.setattr("hamu_lightning.callbacks.goals._statistics._PIECE", 150)
    pieces = draw_means(values)
    assert pieces.shape == (1000,)
    # The spread of means, to 10 %: the standard error of a standard deviation over 1,000 draws is 2 %.
    assert float(pieces.std()) == pytest.approx(float(values.std()) / math.sqrt(50), rel=0.1)


def test_draws_leave_the_global_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    assert torch.equal(draw_means(normal(9)), draw_means(normal(9)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_auc_is_the_share_of_pairs(shift: float) -> None:
    forget, held_out = normal(60), normal(80, shift, seed=1).round(decimals=1)
    forget = forget.round(decimals=1)  # with ties
    pairs = [(b > a) + 0.5 * (b == a) for a in forget.tolist() for b in held_out.tolist()]
    found = estimate_auc(forget, held_out)
    assert found.value == pytest.approx(np.mean(pairs), abs=1e-12)
    # Hanley and McNeil's standard error for near-equal classes, to a third.
    error = math.sqrt((60 + 80 + 1) / (12 * 60 * 80))
    assert found.interval is not None
    assert found.interval[1] - found.interval[0] == pytest.approx(2 * 1.96 * error, rel=1 / 3)
    assert looks_remembered(found) == (shift > 0)


@pytest.mark.parametrize(
    ("auc", "remembered"),
    [(Estimate(0.6, (0.55, 0.65)), True), (Estimate(0.6, (0.49, 0.7)), False), (Estimate(0.53, (0.51, 0.55)), False)],
)
def test_what_counts_as_remembered(auc: Estimate, remembered: bool) -> None:
    """Beyond chance, and by more than retrained models differ among each other."""
    assert looks_remembered(auc) is remembered


def test_the_ratio_of_two_means() -> None:
    before, after = normal(300, 5.0), normal(200, 15.0, seed=3)
    found = estimate_ratio(after, before)
    assert found.value == pytest.approx(float(after.mean() / before.mean()), rel=1e-6)
    assert found.interval is not None
    assert 2.8 < found.interval[0] < found.value < found.interval[1] < 3.2


def test_what_is_not_known_is_no_evidence() -> None:
    """Of a loss that is not finite there are no ranks."""
    auc = estimate_auc(torch.tensor([0.0, math.nan]), torch.ones(3))
    assert not looks_remembered(auc) and tell(auc) == "nan"
