"""Accuracies, losses and their changes against scikit-learn, torch and counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import accuracy_score, log_loss

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional import (
    accuracy,
    change,
    cross_entropies,
    match_classes,
    membership_auc,
    ranks_among,
    rate_estimate,
    share_surer,
)

LOGITS = 2 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(40) % 4


def test_accuracy_and_loss_against_scikit_learn() -> None:
    found = accuracy(LOGITS, LABELS)
    assert found.value == pytest.approx(accuracy_score(LABELS, LOGITS.argmax(1)), abs=1e-12)
    assert found == rate_estimate(round(40 * found.value), 40)
    losses = cross_entropies(LOGITS, LABELS)
    assert float(losses.mean()) == pytest.approx(log_loss(LABELS, LOGITS.softmax(1)), abs=1e-9)
    assert accuracy(LOGITS[:0], LABELS[:0]).reason == "no sample was seen"
    assert accuracy(LOGITS.where(LOGITS < LOGITS.max(), math.nan), LABELS).reason == "1 of 40 predictions are NaN"


def test_float32_losses_of_sure_predictions_are_not_rounded() -> None:
    """In float32 a loss below 1e-7 is 0, and ties hide the order that an attack needs."""
    logits = torch.tensor([[20.0, 0.0], [25.0, 0.0]])
    assert torch.nn.functional.cross_entropy(logits, torch.tensor([0, 0]), reduction="none").unique().numel() == 1
    expected = [math.log1p(math.exp(-20)), math.log1p(math.exp(-25))]
    # A difference of numbers near 20 in float64.
    assert cross_entropies(logits, [0, 0]).tolist() == pytest.approx(expected, abs=1e-14)


def test_the_interval_of_a_change_is_that_of_the_differences() -> None:
    before = 5 * torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    after = before + 0.1 + 0.01 * torch.arange(40) / 40
    found = change(after, before)
    differences = (after - before).numpy()
    expected = norm.interval(0.95, differences.mean(), differences.std(ddof=1) / math.sqrt(40))
    assert found.value == pytest.approx(differences.mean(), abs=1e-12)
    assert found.interval == pytest.approx(expected, abs=1e-12)
    # Of two means: a change of 0.1 would be lost in the spread of the samples.
    assert math.sqrt(2) * 1.96 * float(before.std()) / math.sqrt(40) > 0.5


def test_a_mean_can_hide_samples_that_are_surer() -> None:
    before = torch.full((100,), 0.2)
    after = torch.cat((torch.full((95,), 0.1), torch.full((5,), 60.0)))
    assert change(after, before).value > 2.5
    assert share_surer(after, before) == rate_estimate(95, 100)
    assert share_surer(before, before).value == 0
    for function in (change, share_surer):
        assert function([], []).reason == "no sample was seen"
        assert function([math.nan, 1.0], [1.0, 1.0]).reason in ("1 of 2 changes are NaN", "1 of 2 losses are NaN")
        with pytest.raises(HAMUValueError, match="Give the same samples in the same order"):
            function([1.0], [1.0, 2.0])


def test_infinite_losses() -> None:
    assert change([math.inf, 1.0], [0.0, 0.0]).value == math.inf
    assert change([math.inf, -math.inf], [0.0, 0.0]).reason == "infinite changes of both signs have no mean"


def test_ranks_against_counting() -> None:
    forget, holdout = [0.5, 1.0, 3.0, 1.0], [1.0, 2.0, 1.0, 0.5, 7.0]
    expected = [np.mean([(h < f) + 0.5 * (h == f) for h in holdout]) for f in forget]
    assert ranks_among(forget, holdout).tolist() == pytest.approx(expected, abs=1e-12)
    assert 1 - float(np.mean(expected)) == pytest.approx(membership_auc(forget, holdout).value, abs=1e-12)
    assert ranks_among(forget, []).isnan().all() and ranks_among([], holdout).shape == (0,)
    assert ranks_among([1.0], [math.nan]).isnan().all()


def test_other_labels_are_refused() -> None:
    assert cross_entropies(LOGITS[:2], [0, -100]).isnan().tolist() == [False, True]
    with pytest.raises(HAMUValueError, match="Expected `labels` to be classes from 0 to 3"):
        cross_entropies(LOGITS[:2], [0, 4])
    with pytest.raises(HAMUValueError, match="Expected `labels` to be classes from 0 to 3"):
        accuracy(LOGITS[:2], [0, -100])


def test_matched_classes_have_the_same_shares() -> None:
    labels = torch.tensor([0] * 10 + [1] * 6 + [2] * 9)
    chosen = match_classes(labels, like=torch.tensor([0, 0, 1, 1, 1]))
    assert torch.bincount(labels[chosen]).tolist() == [4, 6]
    assert match_classes(labels, like=torch.tensor([0, 4])).numel() == 0
    assert match_classes(labels, like=[]).numel() == 0 and match_classes([], like=labels).numel() == 0
    digits = torch.arange(100) % 10
    counts = torch.bincount(digits[match_classes(digits, like=[3, 3, 3, 5])], minlength=10)
    assert counts.tolist() == [0, 0, 0, 10, 0, 3, 0, 0, 0, 0]
