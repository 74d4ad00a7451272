"""Gaps, tugs of war and relearning times: known values, limits and missing numbers."""

from __future__ import annotations

import math

import pytest

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional import (
    Estimate,
    anamnesis_index,
    average_gap,
    relearn_steps,
    tow,
    tow_mia,
    undefined,
)

OURS = {"UA": 0.4, "FA": 0.6, "RA": 0.98, "TA": 0.9, "MIA": 0.55}
THEIRS = {"UA": 0.1, "FA": 0.9, "RA": 1.0, "TA": 0.95, "MIA": 0.5}


def test_known_values() -> None:
    assert average_gap(OURS, THEIRS).value == pytest.approx((0.3 + 0.02 + 0.05 + 0.05) / 4, abs=1e-12)
    assert average_gap(OURS, THEIRS, ["RA"]).value == pytest.approx(0.02, abs=1e-12)
    assert tow(OURS, THEIRS).value == pytest.approx(0.7 * 0.98 * 0.95, abs=1e-12)
    assert tow_mia(OURS, THEIRS).value == pytest.approx(0.95 * 0.98 * 0.95, abs=1e-12)


def test_the_ideal_is_the_retrained_model() -> None:
    for measure in (average_gap, tow, tow_mia):
        value = measure(THEIRS, THEIRS)
        assert value.value == value.ideal
        assert measure({name: Estimate(number) for name, number in OURS.items()}, THEIRS) == measure(OURS, THEIRS)


def test_what_is_missing_gives_nan() -> None:
    for measure in (average_gap, tow, tow_mia):
        assert measure(OURS, None).reason == "no retrained model was given"
        assert measure({**OURS, "RA": math.nan}, THEIRS).reason == "RA of the model is NaN"
        assert measure(OURS, {**THEIRS, "TA": undefined("empty")}).reason == "TA of the retrained model is NaN"
        without = {name: number for name, number in OURS.items() if name != "RA"}
        assert measure(without, THEIRS).reason == "RA of the model is missing"


def test_percentages_are_refused() -> None:
    """With percentages the product would have terms such as 1 - 30."""
    with pytest.raises(HAMUValueError, match="Give fractions, not percentages"):
        tow({**OURS, "RA": 98.0}, THEIRS)


def test_relearning() -> None:
    curve = [0.2, 0.5, 0.94, 0.96, 0.5]
    assert relearn_steps(curve, 1.0) == Estimate(3.0)
    assert relearn_steps(curve, 1.0, alpha=0.1) == Estimate(2.0)
    assert relearn_steps(curve, 0.2) == Estimate(0.0)
    assert relearn_steps(curve, 1.0, alpha=0.0) == Estimate(4.0, bound="at least")
    assert relearn_steps([], 1.0).reason == "no step was measured"
    assert relearn_steps([0.1, math.nan, 1.0], 1.0).reason == "the accuracy after 1 steps is NaN"
    assert relearn_steps([1.0, math.nan], 1.0) == Estimate(0.0)
    assert relearn_steps([1.0], math.nan).reason == "the original's accuracy is NaN"


def test_anamnesis_index() -> None:
    capped = Estimate(100.0, bound="at least")
    assert anamnesis_index(5, 10) == Estimate(0.5, ideal=1)
    assert anamnesis_index(capped, 10) == Estimate(10.0, ideal=1, bound="at least")
    assert anamnesis_index(Estimate(5.0), capped) == Estimate(0.05, ideal=1, bound="at most")
    for value, reason in (
        (anamnesis_index(capped, capped), "neither model relearned before the cap"),
        (anamnesis_index(5, 0), "the retrained model needed no step: it knows the data"),
        (anamnesis_index(5, None), "no retrained model was given"),
        (anamnesis_index(undefined("no step was measured"), 5), "no step was measured"),
    ):
        assert value.reason == reason


def test_other_inputs_are_refused() -> None:
    with pytest.raises(HAMUValueError, match="Expected `accuracies` to be a list of numbers"):
        relearn_steps(0.5, 1.0)
    with pytest.raises(HAMUValueError, match="Expected `alpha` to be at least 0 and below 1"):
        relearn_steps([0.5], 1.0, alpha=1.0)
    with pytest.raises(HAMUValueError, match="Expected `steps` to be at least 0"):
        anamnesis_index(-1, 5)
    with pytest.raises(HAMUValueError, match="Expected `names` to hold at least one name"):
        average_gap(OURS, THEIRS, [])
