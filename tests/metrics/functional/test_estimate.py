"""The result type, and the plain intervals."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from scipy.stats import binomtest, norm

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional import Estimate, mean_estimate, rate_estimate, undefined


def test_nan_has_a_reason_and_a_number_has_none() -> None:
    with pytest.raises(HAMUValueError, match="Expected `reason` to say why a value is NaN"):
        Estimate(math.nan)
    with pytest.raises(HAMUValueError, match="but got 1.0 and a reason"):
        Estimate(1.0, reason="nothing was seen")
    assert not undefined("no").is_defined and Estimate(0.0).is_defined


def test_it_is_frozen_and_prints() -> None:
    value = Estimate(0.5, (0.25, 0.75), (8,), 1.0)
    with pytest.raises(FrozenInstanceError):
        value.value = 1.0  # type: ignore[misc]
    assert str(value) == "0.5 [0.25, 0.75] (n = 8, ideal 1)" and float(value) == 0.5
    assert str(Estimate(3.0)) == "3"


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 40), (3, 40), (40, 40), (500, 1001)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_agrees_with_scipy(hits: int, n: int, confidence: float) -> None:
    rate = rate_estimate(hits, n, confidence=confidence)
    expected = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    assert rate.value == hits / n and rate.interval == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_mean_and_its_interval() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = mean_estimate(values, confidence=0.9)
    assert mean.value == pytest.approx(values.numpy().mean(), abs=1e-12)
    expected = norm.interval(0.9, values.numpy().mean(), values.numpy().std(ddof=1) / math.sqrt(50))
    assert mean.interval == pytest.approx(expected, abs=1e-12)


def test_the_interval_ends_at_the_limits() -> None:
    assert mean_estimate([0.0, 1.0, 1.0, 1.0], limits=(0, 1)).interval == (pytest.approx(0.26, abs=0.01), 1)
    assert mean_estimate([0.0, 0.0, 0.0, 1.0], limits=(0, 1)).interval == (0, pytest.approx(0.74, abs=0.01))


def test_degenerate_means() -> None:
    assert mean_estimate([]).reason == "no sample was seen"
    assert mean_estimate([1.0, math.nan], "losses").reason == "1 of 2 losses are NaN"
    assert mean_estimate([2.0]) == Estimate(2.0, n=(1,))
    assert mean_estimate([2.0, 2.0]).interval == (2.0, 2.0)
    assert mean_estimate([2.0, math.inf]) == Estimate(math.inf, n=(2,))
    assert rate_estimate(0, 0).reason == "no sample was seen"


def test_other_inputs_are_refused() -> None:
    with pytest.raises(HAMUValueError, match="Expected `hits` to be at most 2, but got 3"):
        rate_estimate(3, 2)
    with pytest.raises(HAMUValueError, match="Expected `confidence` to be between 0 and 1"):
        mean_estimate([1.0], confidence=95)
    with pytest.raises(HAMUValueError, match=r"Expected `values` to be of shape \[N\]"):
        mean_estimate(torch.ones(2, 2))
