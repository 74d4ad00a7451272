"""Truth ratio, forget quality, utility, leaks and PrivLeak against scipy and loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import hmean, ks_2samp
from torch import Tensor

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional import (
    Estimate,
    forget_quality,
    leak_at_k,
    model_utility,
    priv_leak,
    truth_ratio,
    truth_ratio_of_forgotten,
    truth_ratio_of_kept,
    undefined,
)


def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mean log-probabilities per token of a right answer and of five wrong ones."""
    generator = torch.Generator().manual_seed(seed)
    right = -torch.rand(n, generator=generator, dtype=torch.float64)
    return right, -2 * torch.rand(n, 5, generator=generator, dtype=torch.float64)


def test_both_truth_ratios() -> None:
    right, wrong = draw(30, 0)
    p, q = np.exp(right.numpy()), np.exp(wrong.numpy())
    arithmetic, geometric = truth_ratio(right, wrong), truth_ratio(right, wrong, "geometric")
    assert arithmetic.tolist() == pytest.approx(q.mean(1) / p, abs=1e-9)
    assert geometric.tolist() == pytest.approx(np.prod(q, axis=1) ** (1 / 5) / p, abs=1e-9)
    # locuslab/tofu: exp(mean perturbed loss - paraphrased loss) is its inverse.
    tofu = np.exp(-wrong.numpy().mean(1) + right.numpy())
    assert (1 / geometric).tolist() == pytest.approx(tofu, abs=1e-9)
    assert bool((geometric <= arithmetic).all()) and float((arithmetic - geometric).max()) > 0.01
    one = truth_ratio(right, wrong[:, :1])
    assert one.tolist() == pytest.approx(truth_ratio(right, wrong[:, :1], "geometric").tolist(), abs=1e-9)
    # An answer that cannot be given at all.
    assert truth_ratio([0.0], [[-math.inf, 0.0]]).tolist() == [0.5]


def test_their_means() -> None:
    ratios = truth_ratio(*draw(30, 0))
    values = ratios.numpy()
    assert truth_ratio_of_forgotten(ratios).value == pytest.approx(np.minimum(values, 1 / values).mean(), abs=1e-12)
    assert truth_ratio_of_kept(ratios).value == pytest.approx(np.maximum(0, 1 - values).mean(), abs=1e-12)
    # The inverse leaves the one and breaks the other.
    assert truth_ratio_of_forgotten(1 / ratios).value == pytest.approx(truth_ratio_of_forgotten(ratios).value, abs=1e-9)
    assert truth_ratio_of_kept(1 / ratios).value < 0.5 * truth_ratio_of_kept(ratios).value
    assert truth_ratio_of_forgotten([0.0]).value == 0 and truth_ratio_of_forgotten([math.inf]).value == 0


def test_forget_quality_is_scipys_p_value() -> None:
    ours, retrained = truth_ratio(*draw(40, 0)), truth_ratio(*draw(40, 1))
    expected = ks_2samp(ours.numpy(), retrained.numpy()).pvalue
    quality = forget_quality(ours, retrained)
    assert quality.value == pytest.approx(expected, abs=1e-12) and quality.n == (40, 40)
    assert forget_quality(1 / ours, 1 / retrained).value == pytest.approx(expected, abs=1e-9)
    for value, reason in (
        (forget_quality(ours, None), "no retrained model was given"),
        (forget_quality([], ours), "no sample was seen"),
        (forget_quality([math.nan], ours), "1 of 1 truth ratios of the model are NaN"),
    ):
        assert math.isnan(value.value) and value.reason == reason


def test_with_few_questions_anything_passes() -> None:
    """Two models whose truth ratios lie 0.3 apart: 5 questions do not tell them apart, 200 do."""
    ours, retrained = torch.linspace(0, 1, 200), torch.linspace(0.3, 1.3, 200)
    few, many = forget_quality(ours[::40], retrained[::40]), forget_quality(ours, retrained)
    assert few.value > 0.05 > 1e-6 > many.value and (few.n, many.n) == ((5, 5), (200, 200))


def test_model_utility() -> None:
    scores = {f"score {k}": 0.1 * (k + 1) for k in range(9)}
    assert model_utility(scores).value == pytest.approx(hmean(list(scores.values())), abs=1e-12)
    assert model_utility(scores).n == (9,)
    assert model_utility({**scores, "zero": 0}).value == 0.0
    assert model_utility({"a": Estimate(0.5), "b": 0.5}).value == 0.5
    assert model_utility({}).reason == "no score was given"
    assert model_utility({"retain ROUGE": undefined("empty"), "b": 0.5}).reason == "retain ROUGE is NaN"


@pytest.mark.parametrize(("n", "k"), [(1, 1), (6, 1), (6, 3), (6, 6)])
def test_leak_at_k_is_the_mean_over_all_sets(n: int, k: int) -> None:
    leaks = torch.rand(4, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaks[0] = leaks[0].round()  # ties
    expected = [np.mean([max(chosen) for chosen in itertools.combinations(row, k)]) for row in leaks.tolist()]
    assert leak_at_k(leaks, k).value == pytest.approx(np.mean(expected), abs=1e-9)


def test_leak_at_k_of_zeros_and_ones_is_that_of_pass_at_k() -> None:
    leaks = (torch.arange(20) < 3).double()[None]
    assert leak_at_k(leaks, 5).value == pytest.approx(1 - math.comb(17, 5) / math.comb(20, 5), abs=1e-12)
    # The worst of all 20 says nothing of 5.
    assert float(leaks.max()) == 1.0


def test_leak_without_answers() -> None:
    assert leak_at_k(torch.zeros(0, 4), 2).reason == "no sample was seen"
    assert leak_at_k(torch.zeros(3, 0), 1).reason == "no answer was given"
    assert leak_at_k(torch.full((2, 3), math.nan), 1).reason == "2 of 2 questions are NaN"


@pytest.mark.parametrize(
    ("area", "retrained", "expected"),
    [(0.981, 0.5, -96.2), (0.0, 0.5, 100.0), (0.5, 0.5, 0.0), (0.6, 0.6, 0.0), (1.0, 0.4, -100.0), (0.7, 0.4, -50.0)],
)
def test_priv_leak(area: float, retrained: float, expected: float) -> None:
    """MUSE's own AUC is the share of pairs in which the held-out text has the higher score: 1 minus ours."""
    assert priv_leak(area, retrained).value == pytest.approx(expected, abs=1e-9)
    theirs, reference = 1 - area, 1 - retrained
    assert priv_leak(area, retrained).value == pytest.approx((theirs - reference) / reference * 100, abs=1e-9)


def test_priv_leak_has_the_interval_of_the_auc() -> None:
    value = priv_leak(Estimate(0.7, (0.6, 0.8), (40, 200), 0.5))
    assert value.interval == pytest.approx((-60, -20), abs=1e-9) and value.n == (40, 200) and value.ideal == 0
    assert priv_leak(undefined("no held-out sample was seen")).reason == "no held-out sample was seen"
    assert priv_leak(0.5, 1.0).reason is not None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: truth_ratio([0.0], torch.zeros(2, 3)), r"Expected `perturbed` to be of shape \[1, A\]"),
        (lambda: truth_ratio([0.0], torch.zeros(1, 0)), "with at least one wrong answer"),
        (lambda: truth_ratio([0.0], [[0.0]], "median"), "Expected `mean` to be one of"),  # type: ignore[arg-type]
        (lambda: model_utility({"a": 50.0}), "Give fractions, not percentages"),
        (lambda: leak_at_k(torch.zeros(2, 3), 4), "Expected `k` to be at most 3, but got 4"),
        (lambda: priv_leak(98.1), "Expected `membership` to be between 0 and 1"),
    ],
)
def test_other_inputs_are_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(HAMUValueError, match=words):
        call()
