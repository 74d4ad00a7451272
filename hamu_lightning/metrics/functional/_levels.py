"""Accuracies and losses of a set, and what has become of them since before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional._estimate import Estimate, mean_estimate, rate_estimate, undefined, why_not
from hamu_lightning.metrics.functional._inputs import as_labels, as_log_probs, as_vector, check_classes
from hamu_lightning.metrics.functional._ranks import why_no_ranks


def accuracy(scores: Any, labels: Any) -> Estimate:
    """Share of samples that are classified right: RA, FA, TA on retain, forget and test set; UA = 1 - FA.

    The ideal is the retrained model's. Of equal classes the first counts as predicted.

    Args:
        scores: `[N, K]`, logits or log-probabilities.
        labels: integer `[N]`.

    Returns:
        A fraction with Wilson's interval; NaN with a reason without a sample, or with NaN rows.

    Raises:
        HAMUValueError: If an argument is of another shape, or a label is no class.

    Example:
        >>> print(accuracy(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), [0, 0]))
        0.5 [0.09453, 0.9055] (n = 2)
    """
    log_p = as_log_probs("scores", scores)
    classes = as_labels(labels, log_p)
    check_classes(classes, log_p)
    reason = why_not(log_p.sum(dim=1), "predictions")
    if reason is not None:
        return undefined(reason, (len(log_p),))
    return rate_estimate(int((log_p.argmax(dim=1) == classes).sum()), len(log_p))


def cross_entropies(scores: Any, labels: Any) -> Tensor:
    """Cross-entropy of each sample, nats, in float64: `-log p_y`.

    Args:
        scores: `[N, K]`, logits or log-probabilities.
        labels: integer `[N]`, -100 for none.

    Returns:
        `[N]`; NaN where the label is none.

    Raises:
        HAMUValueError: If an argument is of another shape, or a label is neither a class nor -100.

    Example:
        >>> cross_entropies(torch.zeros(2, 4), [1, -100])
        tensor([1.3863,    nan], dtype=torch.float64)
    """
    log_p = as_log_probs("scores", scores)
    classes = as_labels(labels, log_p)
    there = classes != -100
    check_classes(torch.where(there, classes, 0), log_p)
    return torch.where(there, F.nll_loss(log_p, classes, reduction="none"), torch.nan)


def change(values: Any, before: Any) -> Estimate:
    """Mean change of a number of each sample: the gain of a forget loss, the change of a retain loss.

        mean over samples of (value after - value before)

    The interval is that of the differences: much narrower than that of two means, as the samples are the same. For the
    forget loss the ideal is the retrained model's change, for the retain loss at most 0.

    Args:
        values: `[N]`, one number per sample, losses say.
        before: `[N]`, the same samples before unlearning.

    Returns:
        The mean, in units of `values`; NaN with a reason without a sample, or with NaN.

    Raises:
        HAMUValueError: If the shapes differ.

    Example:
        >>> print(change([3.0, 5.0], [1.0, 2.0]))
        2.5 [1.52, 3.48] (n = 2)
    """
    after, first = _pair(values, before)
    return mean_estimate(after - first, "changes")


def share_surer(losses: Any, before: Any) -> Estimate:
    """Share of samples whose loss is *lower* than before: on the forget set, those that are surer than before.

    A mean loss that has risen can hide that a few samples carry it all. Equal losses do not count.
    The ideal is the retrained model's share, which need not be 0.

    Args:
        losses: `[N]`, one loss per sample.
        before: `[N]`, the same samples before unlearning.

    Returns:
        A fraction with Wilson's interval; NaN with a reason without a sample, or with NaN.

    Raises:
        HAMUValueError: If the shapes differ.

    Example:
        >>> losses = torch.tensor([0.1, 0.1, 0.1, 50.0])
        >>> before = torch.tensor([0.2, 0.2, 0.2, 0.2])
        >>> print(change(losses, before).value > 10, share_surer(losses, before))
        True 0.75 [0.3006, 0.9544] (n = 4)
    """
    after, first = _pair(losses, before)
    reason = why_not(after + first, "losses")
    if reason is not None:
        return undefined(reason, (len(after),))
    return rate_estimate(int((after < first).sum()), len(after))


def ranks_among(losses: Any, holdout_losses: Any) -> Tensor:
    """Where each loss lies among those of held-out samples: 0 below all of them, 1 above all of them.

        share of held-out samples with a lower loss + 1/2 share with the same loss

    Of samples that were never seen the ranks are spread evenly. Their mean is 1 - `membership_auc`.

    Args:
        losses: `[N]`, of the forget set.
        holdout_losses: `[M]`, of held-out samples of the same distribution.

    Returns:
        `[N]`; all NaN where there is no held-out sample or a loss is NaN.

    Raises:
        HAMUValueError: If an argument is of another shape.

    Example:
        >>> ranks_among([0.0, 2.0, 9.0], [1.0, 2.0])
        tensor([0.0000, 0.7500, 1.0000], dtype=torch.float64)
    """
    forget, holdout = as_vector("losses", losses), as_vector("holdout_losses", holdout_losses)
    if why_no_ranks(forget, holdout, "losses") is not None:
        return torch.full_like(forget, torch.nan)
    ranked = holdout.to(forget.device).sort().values
    below, not_above = torch.searchsorted(ranked, forget), torch.searchsorted(ranked, forget, right=True)
    return (below + not_above).to(forget.dtype) / (2 * len(ranked))


def match_classes(labels: Any, like: Any) -> Tensor:
    """Positions of as many samples as possible whose classes have the same shares as in another set.

    Held-out samples are compared with forgotten ones of the same classes: classes differ in how hard they are, and a
    membership attack would find that difference instead.

    Args:
        labels: integer `[M]`, of the samples to choose from; of each class the first ones are taken.
        like: integer `[N]`, of the set whose shares are wanted.

    Returns:
        integer `[P]`, by class; empty where a class of `like` is missing, or one of the two sets is empty.

    Raises:
        HAMUValueError: If an argument is of another shape.

    Example:
        >>> match_classes([0, 0, 0, 1, 1, 2], like=[0, 1])
        tensor([0, 1, 3, 4])
    """
    there, wanted = (as_vector(name, x).long() for name, x in (("labels", labels), ("like", like)))
    if not (len(there) and len(wanted)):
        return there.new_empty(0)
    classes, shares = torch.unique(wanted, return_counts=True)
    places = [(there == c).nonzero().flatten() for c in classes]
    times = min(len(found) / int(share) for found, share in zip(places, shares, strict=True))
    return torch.cat([found[: round(times * int(share))] for found, share in zip(places, shares, strict=True)])


def _pair(values: Any, before: Any) -> tuple[Tensor, Tensor]:
    after, first = as_vector("values", values), as_vector("before", before)
    if after.shape != first.shape:
        raise HAMUValueError(
            f"Expected `before` to be of shape {list(after.shape)}, but got {list(first.shape)}. "
            "Give the same samples in the same order."
        )
    return after, first.to(after.device)
