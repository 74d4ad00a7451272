"""Attacks that rank samples by a score: area under the ROC curve, and what is found at few false alarms."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hamu_lightning.checks import check_choice, check_count, check_number, check_optional, check_seed
from hamu_lightning.metrics.functional._estimate import (
    Estimate,
    normal_quantile,
    rate_estimate,
    undefined,
    why_not,
    wilson,
)
from hamu_lightning.metrics.functional._inputs import as_vector

IntervalMethod = Literal["delong", "bootstrap"]
# Numbers held at once by the bootstrap: 32 MiB for each of its few tables, whatever the number of samples.
_PIECE = 2**22


class KSTest(NamedTuple):
    """A two-sample Kolmogorov-Smirnov test."""

    distance: Estimate
    """D, the largest distance of the two distribution functions, in [0, 1]."""
    p_value: Estimate
    """How likely at least this distance is between two samples of one distribution."""


def auc(
    members: Any,
    others: Any,
    *,
    interval: IntervalMethod | None = "delong",
    confidence: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Area under the ROC curve of a score that is to be higher for members.

        AUC = P(score(member) > score(other)) + 1/2 P(score(member) = score(other))        ideal 0.5, see below

    It is exact, from ranks, for scores of any range. (torchmetrics' `BinaryAUROC` applies a sigmoid to each batch in
    which one score lies outside of [0, 1], which changes ranks between batches and rounds large scores to 1.)
    The ideal is the AUC of a model retrained without the members, which is near 0.5. Other samples must be held out
    and of the members' distribution: the retain set is no substitute.

    The interval covers the choice of the samples, not the spread over trainings. DeLong et al. 1988
    (doi:10.2307/2531595): normal, from the spread of each sample's share of pairs. Where that is 0 in both classes or
    a class has one sample, it says nothing, and Wilson's interval of min(n, m) disjoint pairs takes its place.
    Bootstrap: both classes drawn again with replacement, quantiles of the AUCs; its width is 0 where all pairs are in
    one order.

    Args:
        members: `[N]`, one score per sample that may have been trained on.
        others: `[M]`, one score per held-out sample.
        interval: "delong", "bootstrap", or None for no interval.
        confidence: Probability to be covered, between 0 and 1.
        samples: Number of draws of the bootstrap.
        seed: Seed of the draws; they leave the global random state alone.

    Returns:
        A number in [0, 1]; NaN with a reason where a class is empty or a score is NaN.

    Raises:
        HAMUValueError: If an argument is of another shape or out of range.

    Example:
        >>> print(auc([0.9, 0.4], [0.1, 0.4, 0.2]))
        0.9167 [0.6857, 1] (n = 2 + 3, ideal 0.5)
    """
    inside, outside = as_vector("members", members), as_vector("others", others)
    check_optional(check_choice, "interval", interval, choices=get_args(IntervalMethod))
    z, samples, seed = normal_quantile(confidence), check_count("samples", samples), check_seed(seed)
    outside, n = outside.to(inside.device), (inside.numel(), outside.numel())
    reason = why_no_ranks(inside, outside, "scores")
    if reason is not None:
        return undefined(reason, n, 0.5)
    value = float(compute_auc(inside, outside))
    match interval:
        case None:
            limits = None
        case "delong":
            limits = _delong(inside, outside, value, z)
        case _:
            draws = bootstrap_auc(inside, outside, samples, seed)
            tail = (1 - confidence) / 2
            lower, upper = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
            limits = (lower, upper)
    return Estimate(value, limits, n, 0.5)


def membership_auc(losses: Any, holdout_losses: Any, **options: Any) -> Estimate:
    """AUC of the membership attack by loss: trained on where the loss is low (Yeom et al. 2018, arXiv 1709.01604).

        AUC = P(loss(holdout) > loss(forget)) + 1/2 P(loss(holdout) = loss(forget))        ideal: the retrained model's

    Args:
        losses: `[N]`, of the forget set.
        holdout_losses: `[M]`, of held-out samples of the same distribution. Not of the retain set.
        **options: As for `auc`.

    Returns:
        A number in [0, 1], near 1 where forgotten samples look like members; NaN with a reason as for `auc`.

    Raises:
        HAMUValueError: If an argument is of another shape or out of range.

    Example:
        >>> float(membership_auc([0.1, 0.2], [1.0, 2.0]))
        1.0
    """
    return auc(-as_vector("losses", losses), -as_vector("holdout_losses", holdout_losses), **options)


def tpr_at_fpr(members: Any, others: Any, fpr: float, *, confidence: float = 0.95) -> Estimate:
    """Share of members that an attack finds while it accuses at most a share `fpr` of the other samples.

        max over thresholds t with P(score(other) >= t) <= fpr  of  P(score(member) >= t)        ideal: at most `fpr`

    Carlini et al. 2022, arXiv 2112.03570, at 0.1 % and 1 %. With fewer than `1 / fpr` others it is the share found
    without any false alarm. The interval is Wilson's, over members: the threshold counts as given.

    Args:
        members: `[N]`, one score per member; higher means member.
        others: `[M]`, one score per held-out sample.
        fpr: The allowed share of false alarms, such as 0.001.
        confidence: Probability to be covered, between 0 and 1.

    Returns:
        A number in [0, 1]; NaN with a reason where a class is empty or a score is NaN.

    Raises:
        HAMUValueError: If an argument is of another shape or out of range.

    Example:
        >>> print(tpr_at_fpr([3.0, 2.0, 1.0, 0.0], [2.5, 0.5], 0.5))
        0.75 [0.3006, 0.9544] (n = 4 + 2, ideal 0.5)
    """
    inside, outside = as_vector("members", members), as_vector("others", others)
    fpr = check_number("fpr", fpr, least=0, most=1, cure="Usual choices are 0.001 and 0.01.")
    n, reason = (inside.numel(), outside.numel()), why_no_ranks(inside, outside, "scores")
    if reason is not None:
        return undefined(reason, n, fpr)
    # A score above all but `allowed` others accuses no more than these. 1e-9: 0.29 * 100 is 28.999999999999996.
    allowed = math.floor(fpr * n[1] + 1e-9)
    ranked = outside.sort(descending=True).values
    hits = n[0] if allowed >= n[1] else int((inside > ranked[allowed].to(inside.device)).sum())
    rate = rate_estimate(hits, n[0], confidence=confidence)
    return Estimate(rate.value, rate.interval, n, fpr)


def balanced_accuracy(members: Any, others: Any, threshold: float | None = None) -> Estimate:
    """Mean of the shares of members and of others that a threshold sorts right.

        1/2 P(score(member) >= t) + 1/2 P(score(other) < t)        ideal 0.5

    Args:
        members: `[N]`, one score per member; higher means member.
        others: `[M]`, one score per held-out sample.
        threshold: t, fixed beforehand. None: the best one for these very samples, as in published LiRA code, which
            is above 0.5 by chance alone, the more the fewer samples there are, and has no interval.

    Returns:
        A number in [0, 1], with a normal interval from Wilson's of both shares (Newcombe 1998); NaN with a reason where
        a class is empty or a score is NaN.

    Raises:
        HAMUValueError: If an argument is of another shape or out of range.

    Example:
        >>> float(balanced_accuracy([1.0, 0.5], [0.2, 0.7], threshold=0.6))
        0.5
    """
    inside, outside = as_vector("members", members), as_vector("others", others)
    threshold = check_optional(check_number, "threshold", threshold)
    outside, n = outside.to(inside.device), (inside.numel(), outside.numel())
    reason = why_no_ranks(inside, outside, "scores")
    if reason is not None:
        return undefined(reason, n, 0.5)
    if threshold is None:
        found, falsely = (
            1 - torch.searchsorted(scores.sort().values, torch.cat((inside, outside))).to(inside.dtype) / len(scores)
            for scores in (inside, outside)
        )
        return Estimate(float((1 + found - falsely).max()) / 2, None, n, 0.5)
    shares = [float((inside >= threshold).double().mean()), float((outside < threshold).double().mean())]
    limits = [wilson(share, count, normal_quantile(0.95)) for share, count in zip(shares, n, strict=True)]
    low = math.hypot(*(share - limit[0] for share, limit in zip(shares, limits, strict=True)))
    high = math.hypot(*(limit[1] - share for share, limit in zip(shares, limits, strict=True)))
    return Estimate(sum(shares) / 2, ((sum(shares) - low) / 2, (sum(shares) + high) / 2), n, 0.5)


def ks_test(losses: Any, other_losses: Any) -> KSTest:
    """Two-sample Kolmogorov-Smirnov test of losses: how far apart two distributions are, and whether that is chance.

        D = max over x of |F(x) - F_R(x)|,    F: share of losses that are at most x        ideal 0

    A p-value depends on the number of samples: with few every difference passes, with many none does. Give `n` beside
    it. It is exact up to 10000 samples (Hodges 1958), and takes the samples for independent, which those of one model
    and of another on the *same* data are not: it is too large then. Ties make it too large as well.

    Args:
        losses: `[N]`, one loss per sample (any score: only the order counts).
        other_losses: `[M]`, those of the retrained model, say.

    Returns:
        Distance and p-value; NaN with a reason where one is empty or has a NaN.

    Raises:
        HAMUValueError: If an argument is of another shape.

    Example:
        >>> distance, p_value = ks_test([1.0, 2.0, 3.0], [2.5, 3.5, 4.5])
        >>> print(distance, p_value, sep="; ")
        0.6667 (n = 3 + 3, ideal 0); 0.6 (n = 3 + 3)
    """
    first, second = as_vector("losses", losses), as_vector("other_losses", other_losses)
    second, n = second.to(first.device), (first.numel(), second.numel())
    reason = why_no_ranks(first, second, "losses", ("first", "second"))
    if reason is not None:
        return KSTest(undefined(reason, n, 0), undefined(reason, n))
    points = torch.cat((first, second))
    at_most = [torch.searchsorted(values.sort().values, points, right=True) for values in (first, second)]
    # Whole numbers until the last division, so that the result is exact.
    distance = int((at_most[0] * n[1] - at_most[1] * n[0]).abs().max()) / (n[0] * n[1])
    return KSTest(Estimate(distance, n=n, ideal=0), Estimate(_ks_p_value(first, second), n=n))


def compute_auc(members: Tensor, others: Tensor) -> Tensor:
    """The AUC of scores without NaN of two classes that are not empty, 0-d.

    Example:
        >>> compute_auc(torch.tensor([2.0]), torch.tensor([1.0, 2.0]))
        tensor(0.7500)
    """
    ranked = others.sort().values
    # Others below, and not above, each member: the mean of the two counts ties half.
    below = torch.searchsorted(ranked, members)
    not_above = torch.searchsorted(ranked, members, right=True)
    # Whole numbers until the last division, so that the result is exact.
    return (below + not_above).sum().to(members.dtype) / (2 * members.numel() * others.numel())


def bootstrap_auc(members: Tensor, others: Tensor, samples: int, seed: int) -> Tensor:
    """Return the AUC of `samples` draws with replacement, `[samples]`, on the host.

    The order of the scores does not change between draws, only how often each is drawn. So they are sorted once.
    """
    generator = torch.Generator().manual_seed(seed)
    members, ranked = members.cpu(), others.cpu().sort().values
    below, not_above = torch.searchsorted(ranked, members), torch.searchsorted(ranked, members, right=True)
    pieces = []
    for count in _split_count(samples, max(1, _PIECE // (members.numel() + ranked.numel()))):
        drawn = _draw(count, members.numel(), generator)  # [count, N]
        # Column k: how many of the drawn others are among the k lowest.
        lowest = torch.nn.functional.pad(_draw(count, ranked.numel(), generator).cumsum(dim=1), (1, 0))
        pieces.append((drawn * (lowest[:, below] + lowest[:, not_above])).sum(dim=1))
    return torch.cat(pieces).double() / (2 * members.numel() * ranked.numel())


def why_no_ranks(
    first: Tensor, second: Tensor, what: str, names: tuple[str, str] = ("member", "held-out")
) -> str | None:
    """Why no number can be made of two classes of scores; None where one can."""
    if first.numel() == 0 and second.numel() == 0:
        return "no sample was seen"
    for name, values in zip(names, (first, second), strict=True):
        if values.numel() == 0:
            return f"no {name} sample was seen"
        reason = why_not(values, f"{what} of {name} samples")
        if reason is not None:
            return reason
    return None


def _delong(members: Tensor, others: Tensor, value: float, z: float) -> tuple[float, float]:
    parts = []
    for one, two in ((members, others), (others, members)):
        ranked = two.sort().values
        below, not_above = torch.searchsorted(ranked, one), torch.searchsorted(ranked, one, right=True)
        parts.append((below + not_above).to(one.dtype) / (2 * len(two)))  # the share of pairs of each sample
    variance = sum(float(part.var()) / len(part) if len(part) > 1 else 0.0 for part in parts)
    if min(map(len, parts)) == 1 or variance == 0:
        return wilson(value, min(map(len, parts)), z)
    half = z * math.sqrt(variance)
    return max(0.0, value - half), min(1.0, value + half)


def _ks_p_value(first: Tensor, second: Tensor) -> float:
    import warnings

    from scipy.stats import ks_2samp  # takes half a second to import

    with warnings.catch_warnings():
        # Where the exact way fails in floating point, the asymptotic one is taken, with a warning.
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(ks_2samp(first.cpu().numpy(), second.cpu().numpy()).pvalue)


def _split_count(total: int, piece: int) -> list[int]:
    return [min(piece, total - start) for start in range(0, total, piece)]


def _draw(rows: int, n: int, generator: torch.Generator) -> Tensor:
    """How often each of `n` samples is drawn in `n` draws with replacement: `[rows, n]`."""
    index = torch.randint(n, (rows, n), generator=generator)
    return torch.zeros(rows, n, dtype=torch.long).scatter_add_(1, index, torch.ones_like(index))
