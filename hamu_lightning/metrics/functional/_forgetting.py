"""The score of the first competition on unlearning: how well thresholds tell unlearned from retrained models."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamu_lightning.checks import check_number
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional._estimate import Estimate, mean_estimate, undefined
from hamu_lightning.metrics.functional._inputs import as_matrix

# Bins of epsilon, as in the competition.
_WIDTH, _BINS = 0.5, 13


class ForgettingScore(NamedTuple):
    """What attackers with many models can tell of each sample."""

    score: Estimate
    """Mean of 2 / 2^n over the samples, n the bin of epsilon, in [0, 1]; ideal is what two halves of the retrained
    models have."""
    epsilon: Tensor
    """`[N]`, infinite where the two kinds are told apart without error."""


def forgetting_score(unlearned: Any, retrained: Any, *, delta: float = 0.0) -> ForgettingScore:
    """How indistinguishable unlearned and retrained models are on each sample (Triantafillou et al., arXiv 2406.09073).

        epsilon(x) = max over attacks of max(log(1 - delta - FPR) - log FNR, log(1 - delta - FNR) - log FPR, 0)
        score = mean over x of 2 / 2^n(x),    n = 1 + floor(epsilon / 0.5), at most 13

    The attacks are all thresholds on the log-odds of the label, in both directions, judged on the models that they are
    chosen by. An attack without error makes epsilon infinite; one with a single rate of 0 does not count, since a few
    models cannot tell how small the rate is. With M models of a kind the smallest rate is 1/M: chance alone gives
    epsilons above 0, so compare with the score of two halves of the retrained models. The competition multiplies the
    score by two ratios of accuracies, unlearned by retrained, on retain and test set.

    Args:
        unlearned: `[M, N]`, log-odds of N forget samples by M unlearned models, each from a training of its own.
        retrained: `[M', N]`, the same samples by models trained without them.
        delta: Failure probability, in [0, 1).

    Returns:
        The score with an interval over samples, and each sample's epsilon; NaN with a reason where there is no model
        of a kind, no sample, or a NaN.

    Raises:
        HAMUValueError: If an argument is of another shape or out of range.

    Example:
        >>> margins = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
        >>> found = forgetting_score(margins, margins)
        >>> float(found.score), found.epsilon.tolist()
        (1.0, [0.0])
        >>> float(forgetting_score(margins + 10.0, margins).score)  # 2 / 2^13
        0.000244140625
    """
    ours, theirs = as_matrix("unlearned", unlearned), as_matrix("retrained", retrained)
    delta = check_number("delta", delta, least=0, below=1)
    if theirs.shape[1] != ours.shape[1]:
        raise HAMUValueError(
            f"Expected `retrained` to be of shape [M, {ours.shape[1]}], but got {list(theirs.shape)}. Give the "
            "log-odds of the same samples."
        )
    theirs, n = theirs.to(ours.device), (len(ours), len(theirs), ours.shape[1])
    reason = "no sample was seen" if n[2] == 0 else None
    for name, kind in (("unlearned", ours), ("retrained", theirs)):
        reason = reason or (f"no {name} model was given" if len(kind) == 0 else None)
        reason = reason or (f"log-odds of {name} models are NaN" if kind.isnan().any() else None)
    if reason is not None:
        return ForgettingScore(undefined(reason, n), ours.new_full((n[2],), math.nan))
    epsilon = _best_attack(ours, theirs, delta)
    places = (epsilon / _WIDTH).floor().clamp(max=_BINS - 1) + 1
    mean = mean_estimate(2 * torch.exp2(-places), "scores", limits=(0, 1))
    return ForgettingScore(Estimate(mean.value, mean.interval, n), epsilon)


def _best_attack(ours: Tensor, theirs: Tensor, delta: float) -> Tensor:
    """The largest epsilon over thresholds, `[N]`."""
    best = torch.zeros_like(ours[0])
    for threshold in torch.cat((ours, theirs)):
        above = [(kind >= threshold).to(ours.dtype).mean(dim=0) for kind in (ours, theirs)]
        # Called unlearned from the threshold on, or below it.
        for fnr, fpr in ((1 - above[0], above[1]), (above[0], 1 - above[1])):
            one = torch.log(1 - delta - fpr) - fnr.log()
            other = torch.log(1 - delta - fnr) - fpr.log()
            both = torch.maximum(one, other).nan_to_num(nan=0.0, posinf=math.inf, neginf=0.0)
            counts = (fnr == 0) == (fpr == 0)
            best = torch.maximum(best, torch.where(counts, both, 0.0))
    return best
