"""The verdict: what the evidence of one model says together, by stated thresholds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.evidence._counts import auc, differ_without, is_class, kept, known_best, restored
from hamu_lightning.evidence._rows import AttackRow
from hamu_lightning.evidence._scores import FORGET, RETAIN, TEST, Evaluation
from hamu_lightning.metrics.functional import Estimate, mean_estimate
from hamu_lightning.wording import count

Kind: TypeAlias = Literal[
    "forgotten", "not_forgotten", "masked", "suppressed", "harmed", "over_forgotten", "cannot_tell"
]

# Shares of samples. They were chosen on small digits models (docs/evidence.md) and are no laws.
MORE_THAN_ANY = 0.15
"""So many more forgotten samples than chance explains are better known than to any retrained model."""
NAMED = 0.05
"""So many more forgotten samples than in any retrained model are still recognised, or are after one shift."""
HARM = 0.02
"""So much accuracy on kept data is lost."""
STANDS_OUT = 0.05
"""So far below that of retrained models the membership AUC is where the forgotten samples stand out."""
FURTHER = 2.0
"""So many times what retrained models show is too much: of the loss on a forgotten class, of distances."""
MEANINGFUL = 0.05
"""A Jensen-Shannon divergence below this is small, whatever retrained models have among themselves."""
SAME_ANSWERS = 1e-3
"""Mean total variation up to which two answers are the same."""
RESTORED = 0.95
"""So much of the original's recognition one shift of the output brings back where nothing is gone."""
EXCESS = 0.1
"""So much more than in the control an attack has to find, with intervals that do not overlap."""
UNTOUCHED = 0.5
"""So large a share of the weights in tensors that did not change at all means that the features are the old ones."""
TOO_FEW = 20
"""Fewer forgotten samples than these say nothing."""
INSIDE = ("probe", "relearn", "unchanged")
"""Attacks that look behind the answers; without one of them a new head on old features cannot be seen."""


@dataclass(frozen=True)
class Verdict:
    """What the evidence says: not a proof, and no statement in law.

    Attributes:
        kind: "not_forgotten" (the answers give the data away), "masked" (only the end of the model was changed),
            "suppressed" (the answers have changed, but an attack brings the data back), "harmed" (what was to be kept
            has lost too much), "over_forgotten" (the forgotten samples stand out by how little is known of them),
            "cannot_tell", or "forgotten" (no difference was found from models that never saw the data).
        text: Two sentences for everybody.
        reasons: What it rests on, one sentence each.

    Example:
        >>> Verdict("cannot_tell", "It cannot be told. Give more samples.", ("Only 5 samples were forgotten.",)).kind
        'cannot_tell'
    """

    kind: Kind
    text: str
    reasons: tuple[str, ...]


def judge(
    before: Evaluation, after: Evaluation, references: Sequence[Evaluation] = (), attacks: Sequence[AttackRow] = ()
) -> Verdict:
    """Say what became of the forgotten data, as far as the evidence goes.

    Signs are looked for in this order, and the first that is found gives the kind: memory in the answers, an output
    that was merely masked, data that an attack brings back, harm, samples that stand out, evidence that is
    missing. Where none is found, and the same look does find memory in the original, the data are forgotten.

    Args:
        before: The original.
        after: The model in question; the same samples in the same order.
        references: Models that were trained without the forgotten data; three or more are best.
        attacks: What attacks found. A larger number means that more is left, save in rows that end with "_loss", which
            are not weighed. "unchanged" is the share of weights in tensors that did not change (`compare_weights`).

    Raises:
        HAMUValueError: If the models were not asked for the same samples to forget.

    Example:
        >>> from hamu_lightning.evidence import PartScores
        >>> losses = torch.linspace(0.01, 0.1, 40, dtype=torch.float64)
        >>> model = Evaluation({"forget": PartScores(losses, torch.ones(40), torch.arange(40))})
        >>> judge(model, model).kind
        'not_forgotten'
    """
    _check_same_samples(before, after, *references)
    searches: tuple[tuple[Kind, Callable[[], list[str]]], ...] = (
        ("not_forgotten", lambda: _find_change(before, after, references) + _find_memory(after, references)),
        ("masked", lambda: _find_mask(before, after, attacks)),
        ("suppressed", lambda: _find_restored(before, after, references) + _find_excess(attacks)),
        ("harmed", lambda: _find_harm(before, after, references)),
        ("over_forgotten", lambda: _find_overshoot(before, after, references)),
        ("cannot_tell", lambda: _find_gaps(before, after, references, attacks)),
    )
    found = [(kind, reasons) for kind, search in searches if (reasons := search())]
    reasons = [reason for _, some in found for reason in some] + _compare(after, references)
    kind = found[0][0] if found else "forgotten"
    return Verdict(kind, f"{_SENTENCES[kind]} {_second(kind, [k for k, _ in found], reasons)}", tuple(reasons))


_SENTENCES: dict[Kind, str] = {
    "forgotten": "The model answers as models do that were never shown the data, and no attack found more in it.",
    "not_forgotten": "The model still remembers the data that it was to forget.",
    "masked": "The data were not removed: only the end of the model was changed, and behind it everything is kept.",
    "suppressed": "The model no longer shows the data in its answers, but they are inside and can be brought back.",
    "harmed": "The model no longer shows the data, but it has lost much of what it was to keep.",
    "over_forgotten": "The model knows so little of the data that this gives away which samples were forgotten.",
    "cannot_tell": "From what was measured, nobody can tell whether the data are forgotten.",
}


def _second(kind: Kind, kinds: Sequence[Kind], reasons: Sequence[str]) -> str:
    if kind == "forgotten":
        return "This is what measurements on these samples show, and no proof."
    if kind not in ("harmed", "cannot_tell") and "harmed" in kinds:
        return "It has also lost much of what it was to keep."
    return reasons[0]


def _check_same_samples(*models: Evaluation) -> None:
    first, *others = (model.parts[FORGET].ids for model in models)
    if any(not torch.equal(first, ids) for ids in others):
        raise HAMUValueError(
            "Expected every model to be evaluated on the same samples to forget, in the same order, but got other ids. "
            "Evaluate all of them on the same data."
        )


def _find_change(before: Evaluation, after: Evaluation, references: Sequence[Evaluation]) -> list[str]:
    """Whether the answers to the forgotten samples changed at all, and to most of them in the right direction."""
    mine, old = after.parts[FORGET].losses, before.parts[FORGET].losses
    if torch.allclose(mine, old, rtol=1e-6, atol=1e-6):
        return ["It says of every sample to forget what it said before."]
    floor = max([0.5, *(r.since(before)["surer"].value for r in references)])
    surer = after.since(before)["surer"]
    if _lower(surer) > floor:
        return [f"{_percent(surer)} of the samples to forget are better known to it than before."]
    return []


def _find_memory(model: Evaluation, references: Sequence[Evaluation]) -> list[str]:
    """What in a model's answers no model would say that never saw the forgotten samples."""
    found, named = [], model.parts[FORGET].accuracy
    names = [r.parts[FORGET].accuracy.value for r in references]
    if (references or is_class(model)) and _lower(named) > max(names, default=0.0) + NAMED:
        most = (
            f"a retrained model {_percent(max(names))} at most" if names else "a model that never saw the class cannot"
        )
        found.append(f"It still recognises {_percent(named)} of the samples to forget; {most}.")
    if references:
        others = [[r for r in references if r is not one] for one in references]
        floors = [known_best(r, o).value for r, o in zip(references, others, strict=True) if o]
        best, chance = known_best(model, references), max([1 / (len(references) + 1), *floors])
        if _lower(best) > chance + MORE_THAN_ANY:
            found.append(
                f"{_percent(best)} of the samples to forget are better known to it than to every retrained model, and "
                f"more than by chance; {_percent(chance)} could be."
            )
    if is_class(model):
        return found  # held-out samples of the class are as unknown as they are
    mine, floor = auc(model), max([0.5, *(auc(r).value for r in references)])
    if _lower(mine) > floor:
        found.append(f"Samples to forget are told from held-out ones by their loss: AUC {mine.value:.2f}.")
    return found


def _find_mask(before: Evaluation, after: Evaluation, attacks: Sequence[AttackRow]) -> list[str]:
    """Whether nothing but the outputs of the forgotten classes, or nothing but the last layers, was changed."""
    found = [
        f"{_percent(row.value.value)} of the weights are in tensors that did not change: the old features are there."
        for row in attacks
        if row.name == "unchanged" and row.value.value > UNTOUCHED
    ]
    pairs = [(before.parts[name], part) for name, part in after.parts.items() if name in before.parts]
    if len(after.gone) and all(differ_without(after.gone, *pair) < SAME_ANSWERS for pair in pairs):
        found.insert(0, "All its answers are the old ones, but for the outputs of the forgotten classes.")
    return found


def _find_restored(before: Evaluation, after: Evaluation, references: Sequence[Evaluation]) -> list[str]:
    """Whether one number, added to the outputs of the forgotten classes, brings them back."""
    mine, old = restored(after), restored(before)
    if mine is None or old is None or not references:
        return []
    most = max(value for r in references if (value := restored(r)) is not None)
    if mine < RESTORED * old or mine < most + NAMED:
        return []
    return [
        f"One number added to its output brings {_percent(mine)} of the forgotten class back, and in a retrained "
        f"model {_percent(most)} at most."
    ]


def _find_excess(attacks: Sequence[AttackRow]) -> list[str]:
    return [
        f"The attack {row.name!r} finds {row.value.value:.3g}, and {row.control.value:.3g} in a retrained model."
        for row in attacks
        if row.control is not None
        and not row.name.endswith("_loss")  # of which less means more
        and row.value.value > row.control.value + EXCESS
        and _lower(row.value) > _upper(row.control)
    ]


def _find_harm(before: Evaluation, after: Evaluation, references: Sequence[Evaluation]) -> list[str]:
    """What the model has lost on the data that it was to keep, and retrained models have not."""
    found = []
    for name in (RETAIN, TEST):
        mine, old, *others = (kept(model, name) for model in (after, before, *references))
        if mine is None or old is None or len(mine) != len(old):
            continue
        lost = mean_estimate(old.recognised - mine.recognised)
        floor = min((r.accuracy.value for r in others if r is not None), default=old.accuracy.value)
        if _lower(lost) > 0 and lost.value > HARM and mine.accuracy.value < floor - HARM:
            what = "the data to keep" if name == RETAIN else "test data"
            now, then = (_percent(share, 1) for share in (mine.accuracy, old.accuracy))
            found.append(f"Its accuracy on {what} is {now}, and was {then}.")
    return found


def _find_overshoot(before: Evaluation, after: Evaluation, references: Sequence[Evaluation]) -> list[str]:
    """Whether the forgotten samples stand out by too high a loss."""
    if is_class(after):
        most = max((r.parts[FORGET].loss.value for r in references), default=float("inf"))
        loss = after.parts[FORGET].loss.value
        is_far = loss > FURTHER * most
        return [f"Its loss on the forgotten class is {loss:.3g}, in a retrained model {most:.3g}."] if is_far else []
    others = [auc(r).value for r in references] or [min(0.5, _lower(auc(before)))]
    mine = auc(after)
    if _upper(mine) < min(others) - STANDS_OUT:
        return [f"Forgotten samples are told from held-out ones by a higher loss: AUC {mine.value:.2f}, below 0.5."]
    return []


def _find_gaps(
    before: Evaluation, after: Evaluation, references: Sequence[Evaluation], attacks: Sequence[AttackRow]
) -> list[str]:
    """What would have to be known to say that the data are forgotten."""
    n, found = len(after.parts[FORGET]), []
    if not after.is_whole or not before.is_whole:
        found.append("Only a part of the data was read: evaluate all of it.")
    if n < TOO_FEW:
        found.append(
            f"Only {count(n, 'sample was', 'samples were')} to be forgotten: that is too few for any statistics."
        )
    if not _find_memory(before, references):
        found.append(
            "These measurements find no memory of the data in the original either"
            + ("." if references else ": retrain a model without the data, and give it as a reference.")
        )
    distance, floor = _distance(after, references)
    if floor is not None and _lower(distance) > max(FURTHER * floor, MEANINGFUL):
        found.append("Its answers to the forgotten samples are far from those of retrained models, which differ less.")
    if after.kept_test() is None and RETAIN not in after.parts:
        found.append("Nothing was measured of what was to be kept.")
    known = [row for row in attacks if row.value.is_defined]
    weighed = {row.name for row in known if row.name == "unchanged" or (row.control and row.control.is_defined)}
    if not weighed & set(INSIDE):
        found.append(
            "It cannot be told without an attack on its inside ('probe' or 'relearn', beside a retrained model): a new "
            "last layer on features that keep everything would answer like this."
        )
    if is_class(after) and restored(after) is not None and not (references or "logit_shift" in weighed):
        found.append(
            "It cannot be told without a retrained model, or the attack 'logit_shift' beside one: an output that hides "
            "the class would answer like this."
        )
    return found


def _compare(after: Evaluation, references: Sequence[Evaluation]) -> list[str]:
    """How far its answers on the forgotten data are from retrained models', and these from each other."""
    distance, floor = _distance(after, references)
    if floor is None:
        return []
    return [
        f"Its answers to the forgotten samples differ from those of retrained models by {distance.value:.3f} "
        f"(Jensen-Shannon, 0 to 1), and these from each other by up to {floor:.3f}."
    ]


def _distance(after: Evaluation, references: Sequence[Evaluation]) -> tuple[Estimate, float | None]:
    """The Jensen-Shannon divergence from the retrained models, and the largest among these; None of fewer than two."""
    distance = after.distances(references)["js"]
    if len(references) < 2 or not distance.is_defined:
        return distance, None
    rest = [(one, [r for r in references if r is not one]) for one in references]
    return distance, max(one.distances(others)["js"].value for one, others in rest)


def _lower(estimate: Estimate) -> float:
    """The lower limit; without an interval the value, and NaN where there is no number: it is above nothing."""
    return estimate.value if estimate.interval is None else estimate.interval[0]


def _upper(estimate: Estimate) -> float:
    return estimate.value if estimate.interval is None else estimate.interval[1]


def _percent(share: Estimate | float, digits: int = 0) -> str:
    return f"{100 * float(share):.{digits}f} %"
