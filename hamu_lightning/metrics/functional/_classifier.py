"""What a classifier's probabilities are worth: calibration, and an attack that is trained on them."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hamu_lightning.checks import check_choice, check_count, check_seed
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.metrics.functional._estimate import Estimate, undefined, why_not
from hamu_lightning.metrics.functional._inputs import as_labels, as_log_probs, check_classes
from hamu_lightning.metrics.functional._ranks import auc, why_no_ranks

Norm = Literal["l1", "l2", "max"]


def calibration_error(scores: Any, labels: Any, *, bins: int = 15, norm: Norm = "l1") -> Estimate:
    """How far a classifier's confidence is from its accuracy (Guo et al. 2017, arXiv 1706.04599).

        ECE = sum over bins of share of samples x |accuracy - mean confidence|, in [0, 1]        ideal 0

    over bins of equal width of the largest probability; "l2" is the root of the sum of squares, "max" the largest
    difference. What is forgotten must not be forgotten by confident errors: compare with the retrained model's. With
    few samples per bin it is too large by chance, so compare sets of one size. torchmetrics' `CalibrationError` is the
    same number with float32 sums.

    Args:
        scores: `[N, K]`, logits or log-probabilities.
        labels: integer `[N]`.
        bins: Number of bins.
        norm: "l1", "l2" or "max".

    Returns:
        A number in [0, 1] without an interval; NaN with a reason without a sample, or with NaN rows.

    Raises:
        HAMUValueError: If an argument is of another shape or out of range.

    Example:
        >>> print(calibration_error(torch.tensor([[0.75, 0.25]] * 4).log(), [0, 0, 1, 1]))
        0.25 (n = 4, ideal 0)
    """
    log_p = as_log_probs("scores", scores)
    classes, bins = as_labels(labels, log_p), check_count("bins", bins)
    check_choice("norm", norm, get_args(Norm))
    check_classes(classes, log_p)
    reason, n = why_not(log_p.sum(dim=1), "predictions"), (len(log_p),)
    if reason is not None:
        return undefined(reason, n, 0)
    largest, predicted = log_p.max(dim=1)
    confidence, place = largest.exp(), (largest.exp() * bins).long().clamp_max(bins - 1)
    # Per bin the sum of correctness minus confidence: its share times its difference of means.
    excess = (predicted == classes).to(log_p.dtype) - confidence
    weighted = log_p.new_zeros(bins).index_add_(0, place, excess).abs() / len(log_p)
    share = torch.bincount(place, minlength=bins).to(log_p.dtype) / len(log_p)
    gaps = torch.where(share > 0, weighted / share, 0.0)
    match norm:
        case "l1":
            value = weighted.sum()
        case "l2":
            value = (weighted * gaps).sum().sqrt()
        case _:
            value = gaps.max()
    return Estimate(float(value), None, n, 0)


def trained_attack(
    scores: Any, labels: Any, holdout_scores: Any, holdout_labels: Any, *, folds: int = 5, seed: int = 0
) -> Estimate:
    """AUC of a membership attack that learns from three features: confidence, entropy and correctness.

        confidence = p_y,    entropy = -sum_j p_j log p_j,    correctness = [argmax p = y]        ideal 0.5, see below

    A logistic regression on the standardised features, forget against held-out samples, judged on samples that it was
    not trained on: the mean of the AUCs of `folds` parts. Published attacks of this kind (SalUn, arXiv 2310.12508) are
    trained on *retain* against test samples, and print the share of forget samples called "not trained on"; that tells
    the retain set from the forget set as soon as the two differ by more than membership. The ideal is the retrained
    model's value, which is near 0.5. Below 0.5 is chance.

    Args:
        scores: `[N, K]`, logits or log-probabilities on the forget set.
        labels: integer `[N]`.
        holdout_scores: `[M, K]`, on held-out samples of the same distribution.
        holdout_labels: integer `[M]`.
        folds: Number of parts; less where a class has less samples.
        seed: Seed of the parts.

    Returns:
        A number in [0, 1], with an interval from DeLong's of the parts; NaN with a reason where a class has less than 2
        samples, or with NaN rows.

    Raises:
        HAMUValueError: If an argument is of another shape or out of range.
        HAMUStateError: If scikit-learn is not installed.

    Example:
        >>> sure, unsure = torch.tensor([[5.0, 0.0]]).expand(20, 2), torch.tensor([[1.0, 0.0]]).expand(20, 2)
        >>> float(trained_attack(sure, [0] * 20, unsure, [0] * 20))
        1.0
    """
    folds, seed = check_count("folds", folds, least=2), check_seed(seed)
    inside, outside = (
        _features(as_log_probs(name, given), classes)
        for name, given, classes in (("scores", scores, labels), ("holdout_scores", holdout_scores, holdout_labels))
    )
    n = (len(inside), len(outside))
    reason = why_no_ranks(inside.sum(dim=1), outside.sum(dim=1), "predictions")
    if reason is None and min(n) < 2:
        reason = "an attack cannot be trained and judged with 1 sample of a class"
    if reason is not None:
        return undefined(reason, n, 0.5)
    parts = _attack(inside.cpu(), outside.cpu(), min(folds, *n), seed)
    half = math.hypot(*((part.interval[1] - part.interval[0]) / 2 for part in parts if part.interval)) / len(parts)
    value = math.fsum(part.value for part in parts) / len(parts)
    return Estimate(value, (max(0.0, value - half), min(1.0, value + half)), n, 0.5)


def _features(log_p: Tensor, labels: Any) -> Tensor:
    classes = as_labels(labels, log_p)
    check_classes(classes, log_p)
    confidence = log_p.gather(1, classes[:, None])[:, 0].exp()
    entropy = -torch.where(log_p == -math.inf, 0.0, log_p.exp() * log_p).sum(dim=1)
    is_right = (log_p.argmax(dim=1) == classes).to(log_p.dtype)
    return torch.stack([confidence, entropy, is_right], dim=1)


def _attack(inside: Tensor, outside: Tensor, folds: int, seed: int) -> list[Estimate]:
    """The AUC of each part."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise HAMUStateError(
            "Expected scikit-learn to be installed, but it is not. Install it: pip install scikit-learn"
        ) from error
    features = torch.cat((inside, outside)).numpy()
    truth = (torch.arange(len(features)) < len(inside)).numpy()
    parts = []
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed % 2**32).split(features, truth):
        attack = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
        scores = attack.fit(features[train], truth[train]).decision_function(features[test])
        parts.append(auc(scores[truth[test]], scores[~truth[test]]))
    return parts
