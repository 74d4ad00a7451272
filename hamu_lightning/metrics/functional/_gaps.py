"""Single numbers for how far a model is from the retrained one, made of numbers of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hamu_lightning.checks import check_count, check_number, check_type, describe, is_iterable
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional._estimate import Estimate, undefined

Numbers = Mapping[str, Any]
_GAPS = ("UA", "RA", "TA", "MIA")


def average_gap(numbers: Numbers, retrained: Numbers | None, names: Sequence[str] = _GAPS) -> Estimate:
    """Mean distance of some metrics from the retrained model's (SalUn, Fan et al. 2024, arXiv 2310.12508).

        mean over names of |metric(w) - metric(w_R)|, as fractions        ideal 0; in practice another retrained model's

    UA is 1 minus the accuracy on the forget set, RA and TA the accuracies on retain and test set, MIA the AUC or the
    efficacy of a membership attack. What TU (Harry24k/machine-unlearning-pytorch) calls UG is the term of RA alone.

    Args:
        numbers: For each name the model's number, or its `Estimate`.
        retrained: The same of the retrained model; None where there is none.
        names: Which of them count.

    Returns:
        A number in [0, 1]; NaN with a reason where a number is missing or NaN.

    Raises:
        HAMUValueError: If a number is no fraction in [0, 1], such as a percentage.

    Example:
        >>> ours, theirs = {"UA": 0.3, "RA": 1.0, "TA": 0.9, "MIA": 0.5}, {"UA": 0.1, "RA": 0.9, "TA": 0.9, "MIA": 0.6}
        >>> print(average_gap(ours, theirs))
        0.1 (n = 4, ideal 0)
        >>> print(average_gap(ours, None))
        nan: no retrained model was given
    """
    gaps = _find_gaps(numbers, retrained, names)
    return (
        undefined(gaps, ideal=0)
        if isinstance(gaps, str)
        else Estimate(math.fsum(gaps) / len(gaps), n=(len(gaps),), ideal=0)
    )


def tow(accuracies: Numbers, retrained: Numbers | None) -> Estimate:
    """Tug of war: one minus each gap of accuracy, multiplied (Zhao et al. 2024, arXiv 2406.01257).

        ToW = (1 - |dFA|) (1 - |dRA|) (1 - |dTA|),    d = metric(w) - metric(w_R), as fractions        ideal 1

    Args:
        accuracies: "FA", "RA", "TA": the model's accuracy on forget, retain and test set, or their `Estimate`s.
        retrained: The same of the retrained model; None where there is none.

    Returns:
        A number in [0, 1]; NaN with a reason where a number is missing or NaN.

    Raises:
        HAMUValueError: If a number is no fraction in [0, 1], such as a percentage.

    Example:
        >>> round(float(tow({"FA": 0.5, "RA": 1.0, "TA": 0.9}, {"FA": 0.9, "RA": 1.0, "TA": 0.9})), 4)
        0.6
    """
    return _multiply(_find_gaps(accuracies, retrained, ("FA", "RA", "TA")))


def tow_mia(numbers: Numbers, retrained: Numbers | None) -> Estimate:
    """Tug of war with a membership attack in the place of the accuracy on the forget set (arXiv 2406.01257).

        ToW-MIA = (1 - |dMIA|) (1 - |dRA|) (1 - |dTA|)        ideal 1

    There MIA is the efficacy, the share of forget samples that an attack takes for not trained on.

    Args:
        numbers: "MIA", "RA", "TA" of the model, as fractions, or their `Estimate`s.
        retrained: The same of the retrained model; None where there is none.

    Returns:
        A number in [0, 1]; NaN with a reason where a number is missing or NaN.

    Raises:
        HAMUValueError: If a number is no fraction in [0, 1], such as a percentage.

    Example:
        >>> float(tow_mia({"MIA": 0.5, "RA": 1.0, "TA": 0.9}, {"MIA": 0.5, "RA": 1.0, "TA": 0.9}))
        1.0
    """
    return _multiply(_find_gaps(numbers, retrained, ("MIA", "RA", "TA")))


def relearn_steps(accuracies: Any, original: float, *, alpha: float = 0.05) -> Estimate:
    """How many optimizer steps on forgotten data bring their accuracy back.

        first step k with acc_f(k) >= (1 - alpha) acc_f(w0)        ideal: the retrained model's own

    Golatkar et al. 2020, arXiv 1911.04933; Chundawat et al. 2023, arXiv 2201.05629. What counts is the comparison with
    a retrained model that is taught the same data by the same steps.

    Args:
        accuracies: Accuracy on the forget data after 0, 1, ..., cap steps, fractions.
        original: That of the model before unlearning, a fraction.
        alpha: How much of it may be missing.

    Returns:
        The step, 0 where nothing had been forgotten; "at least" the cap where the curve never gets there; NaN with a
        reason where the curve is empty or has a NaN before it gets there.

    Raises:
        HAMUValueError: If a number is out of range.

    Example:
        >>> float(relearn_steps([0.1, 0.6, 0.96, 1.0], original=1.0))
        2.0
        >>> print(relearn_steps([0.1, 0.2, 0.4], original=1.0))
        at least 2
    """
    original = _as_fraction("original", original)
    alpha = check_number("alpha", alpha, least=0, below=1)
    if not is_iterable(accuracies):
        raise HAMUValueError(f"Expected `accuracies` to be a list of numbers, but got {describe(accuracies)}.")
    curve = [_as_fraction("accuracies", value) for value in accuracies]
    if not curve or math.isnan(original):
        return undefined("the original's accuracy is NaN" if curve else "no step was measured")
    for step, accuracy in enumerate(curve):
        if math.isnan(accuracy):
            return undefined(f"the accuracy after {step} steps is NaN")
        if accuracy >= (1 - alpha) * original:
            return Estimate(float(step))
    # Even one more step might not have been enough, so the last one measured is a lower limit.
    return Estimate(float(len(curve) - 1), bound="at least")


def anamnesis_index(steps: Estimate | float, retrained: Estimate | float | None) -> Estimate:
    """AIN, the anamnesis index: relearning time as a share of the retrained model's.

        AIN = relearn_steps(w) / relearn_steps(w_R)        ideal 1

    Near 0 information is left, well above 1 too much went. Chundawat et al. 2023, arXiv 2201.05629, with alpha = 0.05.

    Args:
        steps: What `relearn_steps` returned for the model.
        retrained: The same for the retrained model; None where there is none.

    Returns:
        A number of at least 0, "at least" or "at most" where one of the two reached the cap; NaN with a reason where
        both did, one is NaN, or the retrained model needed no step.

    Raises:
        HAMUValueError: If these are no numbers of steps.

    Example:
        >>> print(anamnesis_index(Estimate(200.0, bound="at least"), 50))
        at least 4 (ideal 1)
    """
    if retrained is None:
        return undefined("no retrained model was given", ideal=1)
    ours, theirs = _as_steps("steps", steps), _as_steps("retrained", retrained)
    reason = ours.reason or theirs.reason
    if reason is None and theirs.value == 0:
        reason = "the retrained model needed no step: it knows the data"
    if reason is None and ours.bound and theirs.bound:
        reason = "neither model relearned before the cap"
    if reason is not None:
        return undefined(reason, ideal=1)
    bound = ours.bound or ("at most" if theirs.bound else None)
    return Estimate(ours.value / theirs.value, ideal=1, bound=bound)


def _find_gaps(numbers: Numbers, retrained: Numbers | None, names: Sequence[str]) -> list[float] | str:
    """The distances, or why there are none."""
    check_type("names", names, list | tuple, "a list of names")
    if not names:
        raise HAMUValueError("Expected `names` to hold at least one name, but got none.")
    if retrained is None:
        return "no retrained model was given"
    gaps = []
    for name in names:
        pair = []
        for whose, given in (("the model", numbers), ("the retrained model", retrained)):
            check_type("numbers", given, Mapping, "a dict from names to fractions")
            if name not in given:
                return f"{name} of {whose} is missing"
            value = _as_fraction(name, given[name])
            if math.isnan(value):
                return f"{name} of {whose} is NaN"
            pair.append(value)
        gaps.append(abs(pair[0] - pair[1]))
    return gaps


def _multiply(gaps: list[float] | str) -> Estimate:
    return undefined(gaps, ideal=1) if isinstance(gaps, str) else Estimate(math.prod(1 - gap for gap in gaps), ideal=1)


def _as_fraction(name: str, value: Any) -> float:
    """A share in [0, 1], or NaN."""
    value = value.value if isinstance(value, Estimate) else value
    if isinstance(value, float) and math.isnan(value):
        return value
    return check_number(name, value, least=0, most=1, cure="Give fractions, not percentages.")


def _as_steps(name: str, steps: Estimate | float) -> Estimate:
    if isinstance(steps, Estimate):
        return steps
    return Estimate(float(check_count(name, steps, least=0)))
