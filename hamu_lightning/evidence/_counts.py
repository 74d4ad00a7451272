"""What the verdict counts in the answers of models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hamu_lightning.evidence._scores import FORGET, HOLDOUT, TEST, Evaluation, PartScores
from hamu_lightning.metrics.functional import Estimate, membership_auc, rate_estimate, undefined


def is_class(model: Evaluation) -> bool:
    """Whether all samples to forget are of classes that go as a whole."""
    labels = model.parts[FORGET].labels
    return labels is not None and len(model.gone) > 0 and bool(torch.isin(labels, model.gone).all())


def kept(model: Evaluation, name: str) -> PartScores | None:
    """The scores of a part; of test data those of classes that stay."""
    return model.kept_test() if name == TEST else model.parts.get(name)


def auc(model: Evaluation) -> Estimate:
    """Membership by loss: forgotten samples against held-out ones of their classes."""
    others = model.comparable()
    if others is None:
        return undefined("no held-out sample is comparable", (len(model.parts[FORGET]), 0), 0.5)
    return membership_auc(model.parts[FORGET].losses, others.losses)


def known_best(model: Evaluation, others: Sequence[Evaluation]) -> Estimate:
    """Share of forgotten samples with a lower loss than under every other model, and of classifiers above chance."""
    part = model.parts[FORGET]
    is_best = part.losses < torch.stack([other.parts[FORGET].losses for other in others]).amin(0)
    if part.log_probs is not None and part.labels is not None:
        of_label = part.log_probs.gather(1, part.labels[:, None])[:, 0]
        is_best &= of_label.exp() > 1 / part.log_probs.shape[1]
    return rate_estimate(int(is_best.sum()), len(part))


def differ_without(gone: Tensor, one: PartScores, other: PartScores) -> float:
    """Mean total variation of two models' answers, both renormalised without some classes."""
    if one.log_probs is None or other.log_probs is None or len(one) != len(other):
        return float("inf")
    is_kept = torch.ones(one.log_probs.shape[1], dtype=torch.bool)
    is_kept[gone] = False
    first, second = (part.log_probs[:, is_kept].softmax(1) for part in (one, other))  # type: ignore[index]
    return float((first - second).abs().sum(1).mean() / 2)


def held_out(model: Evaluation) -> list[PartScores]:
    """All parts that no model was trained on, of a classifier."""
    parts = [model.parts[name] for name in (HOLDOUT, TEST) if name in model.parts]
    return [part for part in parts if part.labels is not None and part.log_probs is not None]


def restored(model: Evaluation) -> float | None:
    """Most of the gone classes' held-out samples that one shift of their outputs brings back, less what it takes.

    max over b of   P(z_g + b > z_k | y gone) - P(z_g + b > z_k | y kept),      g: best gone class, k: best kept one
    """
    parts = held_out(model) if is_class(model) else []
    if not parts:
        return None
    scores, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("log_probs", "labels"))
    is_kept = torch.ones(scores.shape[1], dtype=torch.bool)
    is_kept[model.gone] = False
    needed = (scores[:, is_kept].amax(1) - scores[:, ~is_kept].amax(1)).nan_to_num(posinf=1e300)
    is_gone = torch.isin(labels, model.gone)
    if not is_gone.any() or is_gone.all():
        return None
    theirs, others = needed[is_gone].sort().values, needed[~is_gone].sort().values
    back = torch.arange(1, len(theirs) + 1, dtype=torch.float64) / len(theirs)
    taken = torch.searchsorted(others, theirs, right=True).double() / len(others)
    return max(0.0, float((back - taken).max()))
