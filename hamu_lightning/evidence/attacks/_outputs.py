"""What the outputs of a model give away about classes that are forgotten as a whole."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hamu_lightning.evidence import PartScores
from hamu_lightning.evidence.attacks._subject import Subject, Unfit
from hamu_lightning.metrics.functional import Estimate, auc, rate_estimate, tpr_at_fpr

Measured = dict[str, tuple[Estimate, str]]

_COST = 0.01


def logit_shift(subject: Subject) -> Measured:
    """Add a constant to the logit of each forgotten class, and see what comes back.

    share of forgotten samples of class c with  z_c + b > max_(j != c) z_j,    b: the largest with at most 1 % of
    the retain samples put into c
    """
    forget, retain = subject.scores("forget"), subject.scores("retain")
    gone, hits, total = subject.gone, 0, 0
    for label in gone:
        lead, theirs = _lead(_of_class(forget, label), label), _lead(retain, label)
        found = tpr_at_fpr(lead, theirs, _COST)
        if found.reason is not None:
            raise Unfit(found.reason)
        hits += round(found.value * len(lead))
        total += len(lead)
    note = (
        "share of the samples of forgotten classes that are recognised again when a constant is added to the logit of "
        "their class, as large as it can be with 1 % of the retain samples taken for it; good: no more than in the "
        "control"
    )
    return {"logit_shift": (rate_estimate(hits, total), f"{note}.")}


def neighbours(subject: Subject) -> Measured:
    """Tell forgotten samples from ordinary ones by the probability of the nearest class.

        AUC of  -max over classes j that stay of  p_j / sum over classes k that stay of p_k,
        forgotten samples against held-out samples of the classes that stay

    In the spirit of arXiv 2506.20893, of which we know the abstract alone ("uses the probabilities assigned by the
    model to neighboring classes to detect unlearned samples"); the details are ours. A retrained model takes a sample
    of a class that it does not know for one of a neighbouring class, and is often sure of it. One that was pushed away
    from the class is sure of nothing, or of anything.
    """
    name = subject.plan.held_out
    if name is None:
        raise Unfit("no held-out data was given")
    gone, forget, held_out = subject.evaluation.gone, subject.scores("forget"), subject.scores(name)
    assert len(subject.gone) and forget.labels is not None and held_out.labels is not None
    mine = forget.select(torch.isin(forget.labels, gone))
    theirs = held_out.select(~torch.isin(held_out.labels, gone))
    note = (
        "AUC by which samples of forgotten classes are told from ordinary ones, from how sure the model is of the "
        "nearest class that stays; good: near the control's, neither above nor below"
    )
    found = auc(-_nearest(mine, gone), -_nearest(theirs, gone))
    return {"neighbours": (replace(found, ideal=None), f"{note}.")}


def _nearest(scores: PartScores, gone: Tensor) -> Tensor:
    """The largest log-probability of a class that stays, among these, `[N]`."""
    log_probs = _log_probs(scores)
    stays = torch.ones(log_probs.shape[1], dtype=torch.bool).index_fill(0, gone, False)
    return log_probs[:, stays].log_softmax(dim=1).amax(dim=1)


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
