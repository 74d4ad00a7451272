"""What the outputs of a model give away about classes that are forgotten as a whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hamu_lightning.evidence import PartScores
from hamu_lightning.evidence.attacks._probe import make_head
from hamu_lightning.evidence.attacks._subject import Subject, Unfit
from hamu_lightning.metrics.functional import Estimate, auc, rate_estimate, tpr_at_fpr

Measured = dict[str, tuple[Estimate, str]]

_COST = 0.01
_FOLDS = 5
_NEIGHBOURS = 3
# exp(-50) is nothing; a class that is switched off has log-probability -inf.
_LOWEST = -50.0


def logit_shift(subject: Subject) -> Measured:
    """Add a constant to the logit of each forgotten class, and see what comes back.

    share of forgotten samples of class c with  z_c + b > max_(j != c) z_j,    b: the largest with at most 1 % of
    the retain samples put into c
    """
    forget, retain = subject.scores("forget"), subject.scores("retain")
    gone, hits, total = subject.gone, 0, 0
    for label in gone:
        lead, theirs = _lead(_of_class(forget, label), label), _lead(retain, label)
        hits += round(tpr_at_fpr(lead, theirs, _COST).value * len(lead))
        total += len(lead)
    note = (
        "share of the samples of forgotten classes that are recognised again when a constant is added to the logit of "
        "their class, as large as it can be with 1 % of the retain samples taken for it; good: no more than in the "
        "control"
    )
    return {"logit_shift": (rate_estimate(hits, total), f"{note}.")}


def neighbours(subject: Subject) -> Measured:
    """Tell forgotten samples from held-out ones of neighbouring classes, by the probabilities of the classes that stay.

    In the spirit of arXiv 2506.20893, of which we know the abstract alone ("uses the probabilities assigned by the
    model to neighboring classes to detect unlearned samples"); the details are ours. Neighbours are the three classes
    that the model finds likeliest on the forgotten samples. The attack is a logistic regression on log-probabilities
    without the forgotten classes, judged on samples that it was not trained on.
    """
    name = subject.plan.held_out
    if name is None:
        raise Unfit("no held-out data was given")
    forget, held_out, gone = subject.scores("forget"), subject.scores(name), subject.gone
    kept = [label for label in range(_log_probs(forget).shape[1]) if label not in gone]
    found = [_tell_apart(_of_class(forget, label), held_out, kept) for label in gone]
    n = sum(x.n[0] for x in found), sum(x.n[1] for x in found)
    value = math.fsum(x.value * x.n[0] for x in found) / n[0]
    half = math.hypot(*(x.n[0] * (x.interval[1] - x.interval[0]) / 2 for x in found if x.interval)) / n[0]
    note = (
        "AUC by which samples of forgotten classes are told from held-out ones of neighbouring classes, from the "
        "probabilities of the classes that stay; good: no more than in the control"
    )
    return {"neighbours": (Estimate(value, (max(0.0, value - half), min(1.0, value + half)), n), f"{note}.")}


def _tell_apart(forget: PartScores, held_out: PartScores, kept: list[int]) -> Estimate:
    mine, theirs = (_log_probs(x)[:, kept].log_softmax(dim=1).clamp_min(_LOWEST) for x in (forget, held_out))
    closest = torch.tensor(kept)[mine.exp().mean(dim=0).topk(min(_NEIGHBOURS, len(kept))).indices]
    assert held_out.labels is not None
    theirs = theirs[torch.isin(held_out.labels, closest)]
    if min(len(mine), len(theirs)) < _FOLDS:
        raise Unfit(f"an attack cannot be trained and judged with less than {_FOLDS} samples of each kind")
    return auc(*_judge(mine, theirs))


def _judge(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """The score of each sample under a head that has not seen it."""
    points, truth = torch.cat([mine, theirs]), torch.arange(len(mine) + len(theirs)) < len(mine)
    # Both kinds are spread over the folds alike.
    folds = torch.cat([torch.arange(len(mine)), torch.arange(len(theirs))]) % _FOLDS
    scores = torch.empty(len(points), dtype=torch.float64)
    for fold in range(_FOLDS):
        head = make_head(points[folds != fold].numpy(), truth[folds != fold].numpy())
        scores[folds == fold] = torch.as_tensor(head.decision_function(points[folds == fold].numpy()))
    return scores[truth], scores[~truth]


def _of_class(scores: PartScores, label: int) -> PartScores:
    assert scores.labels is not None
    return scores.select(scores.labels == label)


def _lead(scores: PartScores, label: int) -> Tensor:
    """By how much the logit of a class is above all others, `[N]`."""
    log_probs = _log_probs(scores)
    others = torch.cat([log_probs[:, :label], log_probs[:, label + 1 :]], dim=1)
    return log_probs[:, label] - others.amax(dim=1)


def _log_probs(scores: PartScores) -> Tensor:
    if scores.log_probs is None:
        raise Unfit("it is no classifier with one class per sample")
    return scores.log_probs
