"""One number for the trade-off between what was kept and what was forgotten."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from hamu_lightning.evidence._scores import FORGET, RETAIN, Evaluation
from hamu_lightning.metrics.functional import Estimate, undefined

_GAPS = ("FA", "RA", "TA", "auc")
_NOT_KEPT = "nothing says what was kept"
_NOT_FORGOTTEN = "nothing says what was forgotten"


class TradeOff(NamedTuple):
    """A score, and what is not in it.

    Attributes:
        score: In [0, 1]; NaN with a reason where one of the two sides cannot be told.
        left_out: For each part that is missing the reason.
    """

    score: Estimate
    left_out: dict[str, str]


def trade_off(now: Evaluation, before: Evaluation, references: Sequence[Evaluation] = ()) -> TradeOff:
    """Return how well a model forgets and keeps at once, in [0, 1]; for choosing a checkpoint, not as evidence.

    With references, models that never saw the forgotten data, it is ToW (Zhao et al. 2024, arXiv 2406.01257) with
    membership as a fourth part, each gap from the mean of the references:

        (1 - |dFA|) (1 - |dRA|) (1 - |dTA|) (1 - |dAUC|)        ideal 1

    Without them, AUC being that of the attack by loss between forgotten and held-out samples (docs/metrics.md), and FA
    the accuracy on those of forgotten classes that go as a whole, which a retrained model never gives:

        min(1, RA / RA_before) (1 - |2 AUC - 1|) (1 - FA)        ideal 1

    Where no class goes the last part is left out. Where there is no accuracy, `min(1, L_before / L)` of the mean retain
    loss L takes the first place. A part that is NaN is left out.

    Args:
        now: The model.
        before: The same samples before unlearning.
        references: The same samples under models that never saw the forgotten ones.

    Example:
        >>> from hamu_lightning.evidence import PartScores
        >>> scores = PartScores(torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.arange(4))
        >>> same = Evaluation({"retain": scores, "forget": scores, "holdout": scores})
        >>> print(trade_off(same, same).score.value)
        1.0
    """
    numbers = now.numbers(quick=True)
    sides: tuple[tuple[str, ...], tuple[str, ...]] = (
        (("RA", "TA"), ("FA", "auc")) if references else (("kept",), ("auc", "gone"))
    )
    if references:
        theirs = [reference.numbers(quick=True) for reference in references]
        parts = {name: _gap(numbers, theirs, name) for name in _GAPS}
    else:
        parts = {"kept": _kept(now, before), "auc": _two_sided(numbers["auc"])}
        # A class that is still recognised is remembered, however alike its held-out samples are.
        if len(now.gone):
            parts["gone"] = 1 - _recognised(now)
    left_out = {name: part for name, part in parts.items() if isinstance(part, str)}
    known = {name: part for name, part in parts.items() if not isinstance(part, str)}
    for side, fault in zip(sides, (_NOT_KEPT, _NOT_FORGOTTEN), strict=True):
        if not known.keys() & set(side):
            reason = "; ".join(dict.fromkeys(left_out[name] for name in side if name in left_out))
            return TradeOff(undefined(f"{fault}: {reason}", ideal=1), left_out)
    return TradeOff(Estimate(math.prod(known.values()), ideal=1), left_out)


def _gap(numbers: Mapping[str, Estimate], theirs: Sequence[Mapping[str, Estimate]], name: str) -> float | str:
    found = [each.get(name, undefined("no such data was given")) for each in (numbers, *theirs)]
    reason = next((estimate.reason for estimate in found if estimate.reason is not None), None)
    if reason is not None:
        return reason
    ours, *others = (estimate.value for estimate in found)
    return 1 - abs(ours - math.fsum(others) / len(others))


def _recognised(now: Evaluation) -> float:
    """The accuracy on the samples whose class goes as a whole."""
    forget = now.parts[FORGET]
    assert forget.labels is not None
    return forget.select(torch.isin(forget.labels, now.gone)).accuracy.value


def _two_sided(auc: Estimate) -> float | str:
    return 1 - abs(2 * auc.value - 1) if auc.reason is None else auc.reason


def _kept(now: Evaluation, before: Evaluation) -> float | str:
    """What is left of the retain accuracy, or of the retain loss, at most 1."""
    if RETAIN not in now.parts or RETAIN not in before.parts:
        return "no retain data was given"
    after, first = now.parts[RETAIN], before.parts[RETAIN]
    if after.accuracy.is_defined and first.accuracy.is_defined:
        return _ratio(after.accuracy.value, first.accuracy.value)
    if after.loss.is_defined and first.loss.is_defined and min(after.losses.min(), first.losses.min()) >= 0:
        return _ratio(first.loss.value, after.loss.value)
    return after.loss.reason or first.loss.reason or "a loss below 0 has no ratio"


def _ratio(ours: float, theirs: float) -> float:
    return 1.0 if ours >= theirs else ours / theirs
