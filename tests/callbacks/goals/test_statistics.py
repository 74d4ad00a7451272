"""Means and ranks with intervals, against loops and normal theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hamu_lightning.callbacks.goals._statistics import (
    Estimate,
    draw_means,
    estimate_auc,
    estimate_mean,
    estimate_ratio,
    looks_remembered,
    rank_among,
)


def normal(n: int, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    return mean + torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = normal(400, 2.0)
    found, error = estimate_mean(values), float(values.std()) / math.sqrt(400)
    assert found.value == pytest.approx(float(values.mean()), rel=1e-6)  # float32
    for limit, side in ((found.lower, -1), (found.upper, 1)):
        assert limit == pytest.approx(found.value + side * 1.96 * error, abs=0.15 * error)  # 1,000 draws


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
    assert found.upper - found.lower == pytest.approx(2 * 1.96 * error, rel=1 / 3)
    assert looks_remembered(found) == (shift > 0)


@pytest.mark.parametrize(
    ("auc", "remembered"),
    [(Estimate(0.6, 0.55, 0.65), True), (Estimate(0.6, 0.49, 0.7), False), (Estimate(0.53, 0.51, 0.55), False)],
)
def test_what_counts_as_remembered(auc: Estimate, remembered: bool) -> None:
    """Beyond chance, and by more than retrained models differ among each other."""
    assert looks_remembered(auc) is remembered


def test_the_ratio_of_two_means() -> None:
    before, after = normal(300, 5.0), normal(200, 15.0, seed=3)
    found = estimate_ratio(after, before)
    assert found.value == pytest.approx(float(after.mean() / before.mean()), rel=1e-6)
    assert 2.8 < found.lower < found.value < found.upper < 3.2


def test_ranks_are_counted() -> None:
    losses, others = normal(30).round(decimals=1), normal(20, seed=5).round(decimals=1)
    expected = [sum((o < x) + 0.5 * (o == x) for o in others.tolist()) / 20 for x in losses.tolist()]
    assert rank_among(losses, others).tolist() == pytest.approx(expected)
