"""AUC, rates at few false alarms and the Kolmogorov-Smirnov test against scikit-learn, scipy and counting."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from torchmetrics.classification import BinaryAUROC

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional import auc, balanced_accuracy, ks_test, membership_auc, rate_estimate, tpr_at_fpr


def draw(n: int, m: int, shift: float = 0.7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    members = torch.randn(n, generator=generator, dtype=torch.float64) + shift
    return members, torch.randn(m, generator=generator, dtype=torch.float64)


def joined(members: Any, others: Any) -> tuple[Any, Any]:
    truth = np.repeat([1, 0], [len(members), len(others)])
    return truth, np.concatenate([np.asarray(members), np.asarray(others)])


SCORES = st.lists(st.integers(0, 5), min_size=1, max_size=15)


@given(SCORES, SCORES, st.sampled_from([0.0, 0.01, 0.1, 0.3, 1.0]))
@settings(max_examples=60, deadline=None)
def test_with_ties(members: list[int], others: list[int], fpr: float) -> None:
    truth, scores = joined(members, others)
    found, alarms = (sorted(values) for values in (members, others))
    assert auc(members, others).value == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    thresholds = [*sorted({*members, *others}), math.inf]
    rates = [[np.mean([s >= t for s in values]) for t in thresholds] for values in (found, alarms)]
    best = max(hit for hit, alarm in zip(*rates, strict=True) if alarm <= fpr)
    assert tpr_at_fpr(members, others, fpr).value == pytest.approx(best, abs=1e-12)
    accuracy = max((1 + hit - alarm) / 2 for hit, alarm in zip(*rates, strict=True))
    assert balanced_accuracy(members, others).value == pytest.approx(accuracy, abs=1e-12)
    assert balanced_accuracy(members, others, threshold=2).value == pytest.approx(
        (np.mean(np.array(members) >= 2) + np.mean(np.array(others) < 2)) / 2, abs=1e-12
    )


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 50), (300, 500)])
def test_without_ties(n: int, m: int) -> None:
    members, others = draw(n, m)
    truth, scores = joined(members, others)
    assert auc(members, others).value == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    alarms, hits, _ = roc_curve(truth, scores, drop_intermediate=False)
    for fpr in (0.001, 0.01, 0.2):
        assert tpr_at_fpr(members, others, fpr).value == pytest.approx(hits[alarms <= fpr].max(), abs=1e-12)
    assert membership_auc(-members, -others) == auc(members, others)


def test_sigmoids_of_batches_are_another_number() -> None:
    """torchmetrics squashes each batch in which one score lies outside of [0, 1]; losses above 20 all become 1."""
    members, others = draw(60, 60, shift=-1.0)
    losses, truth = torch.cat((members, others)), torch.arange(120) < 60
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    for scale, shift in ((0.3, 0.5), (1.0, 35.0)):
        naive = BinaryAUROC()
        for batch in order.split(4):
            naive.update((scale * losses[batch] + shift).float(), (~truth[batch]).long())
        ours = membership_auc(scale * members + shift, scale * others + shift)
        expected = roc_auc_score(truth, -losses)
        assert ours.value == pytest.approx(expected, abs=1e-12)
        assert abs(float(naive.compute()) - expected) > 0.005


def delong_by_loops(members: Any, others: Any, z: float) -> tuple[float, float]:
    psi = np.array([[float(x > y) + 0.5 * float(x == y) for y in others] for x in members])
    variance = np.var(psi.mean(1), ddof=1) / len(members) + np.var(psi.mean(0), ddof=1) / len(others)
    return max(0.0, psi.mean() - z * math.sqrt(variance)), min(1.0, psi.mean() + z * math.sqrt(variance))


@pytest.mark.parametrize("decimals", [1, 8])
def test_delong_against_loops(decimals: int) -> None:
    members, others = (scores.round(decimals=decimals) for scores in draw(40, 60))
    interval = auc(members, others).interval
    assert interval == pytest.approx(delong_by_loops(members.tolist(), others.tolist(), 1.959963984540054), abs=1e-9)


def test_delong_and_bootstrap_agree() -> None:
    members, others = draw(150, 200)
    by_formula, by_draws = (auc(members, others, interval=kind) for kind in ("delong", "bootstrap"))
    assert by_formula.value == by_draws.value
    assert by_formula.interval is not None and by_draws.interval is not None
    # Quantiles of 1000 draws have a standard error of about 2 % of the width; five of them.
    width = by_formula.interval[1] - by_formula.interval[0]
    assert by_draws.interval == pytest.approx(by_formula.interval, abs=0.1 * width)
    assert auc(members, others, interval=None).interval is None


def test_delong_covers_the_true_value() -> None:
    covered = 0
    for seed in range(300):
        interval = auc(*draw(40, 40, 0.0, seed), confidence=0.9).interval
        assert interval is not None
        covered += interval[0] <= 0.5 <= interval[1]
    # 270 expected, less some 2 % for the normal form at 40 samples a class; standard deviation 5.2, four of them.
    assert 245 <= covered <= 290


@pytest.mark.parametrize(("members", "others"), [([2.0, 3.0, 4.0], [0.0, 1.0]), ([1.0], [0.0, 2.0]), ([1.0], [1.0])])
def test_an_interval_that_delong_cannot_give_is_wide(members: list[float], others: list[float]) -> None:
    """With all pairs in one order the spread is 0: width 0 would say that two samples prove it."""
    value = auc(members, others)
    pairs = min(len(members), len(others))
    expected = {1.0: rate_estimate(pairs, pairs).interval}.get(value.value)
    assert value.interval is not None and value.interval[1] - value.interval[0] > 0.6
    assert expected is None or value.interval == expected


def nan_cases() -> list[tuple[list[float], list[float], str]]:
    nan = math.nan
    return [
        ([], [1.0], "no member sample was seen"),
        ([1.0], [], "no held-out sample was seen"),
        ([], [], "no sample was seen"),
        ([1.0, nan], [1.0], "1 of 2 scores of member samples are NaN"),
        ([1.0], [nan, nan, 2.0], "2 of 3 scores of held-out samples are NaN"),
    ]


@pytest.mark.parametrize(("members", "others", "reason"), nan_cases())
def test_an_empty_class_or_nan_gives_nan(members: list[float], others: list[float], reason: str) -> None:
    for value in (
        auc(members, others),
        tpr_at_fpr(members, others, 0.1),
        balanced_accuracy(members, others),
        balanced_accuracy(members, others, 0.5),
    ):
        assert math.isnan(value.value) and value.reason == reason and value.interval is None
        assert value.n == (len(members), len(others))


def test_all_scores_equal() -> None:
    same = [3.0] * 20
    assert auc(same, same).value == 0.5
    assert tpr_at_fpr(same, same, 0.01).value == 0 and tpr_at_fpr(same, same, 1).value == 1
    assert balanced_accuracy(same, same).value == 0.5
    assert ks_test(same, same).distance.value == 0 and ks_test(same, same).p_value.value == 1


def test_a_share_of_false_alarms_is_not_rounded_down() -> None:
    """0.29 * 100 is 28.999999999999996."""
    members, others = [71.0], [float(k) for k in range(100)]
    assert tpr_at_fpr(members, others, 0.29).value == 1 and tpr_at_fpr(members, others, 0.28).value == 0


def test_the_rate_has_wilsons_interval() -> None:
    rate = tpr_at_fpr(torch.arange(40.0) + 10, torch.arange(20.0), 0.0)
    assert (rate.value, rate.interval) == (0.75, rate_estimate(30, 40).interval) and rate.n == (40, 20)


@given(SCORES, SCORES)
@settings(max_examples=60, deadline=None)
def test_ks_with_ties(first: list[int], second: list[int]) -> None:
    points = sorted({*first, *second})
    distance = max(abs(np.mean([x <= t for x in first]) - np.mean([x <= t for x in second])) for t in points)
    assert ks_test(first, second).distance.value == pytest.approx(distance, abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 4), (5, 4)])
def test_the_p_value_counts_all_splits(n: int, m: int) -> None:
    """Without ties: of all ways to name n of n + m samples the first, the share with at least this distance."""
    values = torch.randperm(n + m, generator=torch.Generator().manual_seed(0)).double()
    first, second = values[:n].tolist(), values[n:].tolist()
    observed = ks_test(first, second)

    def distance(chosen: tuple[int, ...]) -> float:
        rest = [v for v in range(n + m) if v not in chosen]
        return max(abs(sum(x <= t for x in chosen) / n - sum(x <= t for x in rest) / m) for t in range(n + m))

    distances = [distance(chosen) for chosen in itertools.combinations(range(n + m), n)]
    expected = np.mean([d >= observed.distance.value - 1e-12 for d in distances])
    assert observed.p_value.value == pytest.approx(expected, abs=1e-12)


def test_ks_of_many_samples() -> None:
    first, second = draw(800, 1200, 0.1)
    ours, scipys = ks_test(first, second), ks_2samp(first.numpy(), second.numpy())
    assert ours.distance.value == pytest.approx(scipys.statistic, abs=1e-12)
    assert ours.p_value.value == pytest.approx(scipys.pvalue, abs=1e-12)
    assert ours.distance.n == ours.p_value.n == (800, 1200)
    assert ks_test([1.0, math.inf], [1.0, 2.0]).distance.value == 0.5


def test_ks_without_samples() -> None:
    for first, second, reason in (
        ([], [1.0], "no first sample was seen"),
        ([1.0], [math.nan], "1 of 1 losses of second samples are NaN"),
    ):
        result = ks_test(first, second)
        assert result.distance.reason == result.p_value.reason == reason


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: auc([1.0], [1.0], interval="exact"), "Expected `interval` to be one of 'delong', 'bootstrap'"),  # type: ignore[arg-type]
        (lambda: auc(torch.ones(2, 2), [1.0]), r"Expected `members` to be of shape \[N\]"),
        (lambda: auc([1.0], [1.0], samples=0), "Expected `samples` to be at least 1"),
        (lambda: tpr_at_fpr([1.0], [1.0], 5.0), "Expected `fpr` to be between 0 and 1"),
        (lambda: ks_test("abc", [1.0]), "Expected `losses` to hold numbers"),
    ],
)
def test_other_inputs_are_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(HAMUValueError, match=words):
        call()
