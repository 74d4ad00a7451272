"""How far a model's predictions are from those of models that never saw the forgotten data.

Predictions are logits or log-probabilities `[N, K]`; both give the same numbers. A reference is one such tensor, or a
list of them: a *pool*, of which the mean is taken. Two retrained models differ as well, and how much is the floor of
every distance here: leave one model out of the pool, and measure it against the rest.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hamu_lightning.checks import check_choice
from hamu_lightning.metrics.functional._comparison import DISTANCES, js_of, kl_of, phi_of
from hamu_lightning.metrics.functional._estimate import Estimate, undefined, why_not
from hamu_lightning.metrics.functional._inputs import as_labels, as_log_probs, as_pool, check_same_shape

Unit = Literal["share", "nats"]
Direction = Literal["forward", "reverse"]


def kl_divergence(p: Any, q: Any) -> Tensor:
    """KL(p || q) = sum_y p_y log(p_y / q_y) of each sample, from the first to the second, in nats.

    A class with p_y = 0 adds nothing, one with q_y = 0 < p_y makes it infinite.

    `F.kl_div(log_p, m)` is KL(m || p): its first argument is the *second* distribution, in logarithms, and by default
    it is divided by the number of classes.

    Args:
        p: `[N, K]`, logits or log-probabilities.
        q: `[N, K]`.

    Returns:
        `[N]`, at least 0.

    Raises:
        HAMUValueError: If the shapes are others.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
        >>> [round(kl.item(), 4) for kl in (kl_divergence(p.log(), q.log()), kl_divergence(q.log(), p.log()))]
        [0.1438, 0.1308]
    """
    return kl_of(*_pair(p, q))


def js_divergence(p: Any, q: Any) -> Tensor:
    """Jensen-Shannon divergence of each sample, in nats: between 0 and ln 2.

        JS(p, q) = 1/2 KL(p || m) + 1/2 KL(q || m),    m = (p + q) / 2    (Lin 1991)

    Args:
        p: `[N, K]`, logits or log-probabilities.
        q: `[N, K]`.

    Returns:
        `[N]`; divided by ln 2 it is between 0 and 1.

    Raises:
        HAMUValueError: If the shapes are others.

    Example:
        >>> import math
        >>> p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> js_divergence(p.log(), q.log()) / math.log(2)
        tensor([1.], dtype=torch.float64)
    """
    return js_of(*_pair(p, q))


def js_to_references(scores: Any, references: Any, *, unit: Unit = "share") -> Estimate:
    """Mean Jensen-Shannon divergence between a model's predictions and those of references.

        mean over samples, and over the pool, of JS(p_w, p_R)        ideal 0; in practice the floor, see above

    The usual choice of samples is the forget set. Published ZRF code computes the divergence by `F.kl_div(log p, m)`
    with its default reduction: the reverse direction, divided by the number of classes.

    Args:
        scores: `[N, K]`, logits or log-probabilities of the model.
        references: `[N, K]`, or a list of such: the same samples in the same order.
        unit: "share" of ln 2, in [0, 1], or "nats".

    Returns:
        The mean, with an interval over samples; NaN with a reason without a sample or a reference, or with NaN rows.

    Raises:
        HAMUValueError: If an argument is of another shape or kind.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> float(js_to_references(logits, [logits, logits + 3.0]))
        0.0
        >>> print(js_to_references(logits, []))
        nan: no reference was given
    """
    check_choice("unit", unit, get_args(Unit))
    return _measure("js" if unit == "share" else "js_nats", scores, references)


def kl_to_references(scores: Any, references: Any, *, direction: Direction = "forward") -> Estimate:
    """Mean Kullback-Leibler divergence between a model's predictions and those of references, in nats.

        forward   mean of KL(p_R || p_w), from the reference to the model: large where the model misses something
        reverse   mean of KL(p_w || p_R), from the model to the reference                              ideal 0 each

    Args:
        scores: `[N, K]`, logits or log-probabilities of the model.
        references: `[N, K]`, or a list of such: the same samples in the same order.
        direction: "forward" or "reverse".

    Returns:
        The mean, with an interval over samples; NaN with a reason without a sample or a reference, or with NaN rows.

    Raises:
        HAMUValueError: If an argument is of another shape or kind.

    Example:
        >>> model, retrained = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> round(float(kl_to_references(model, retrained)), 4)
        0.1438
        >>> round(float(kl_to_references(model, retrained, direction="reverse")), 4)
        0.1308
    """
    check_choice("direction", direction, get_args(Direction))
    return _measure(f"kl_{direction}", scores, references)


def agreement(scores: Any, references: Any) -> Estimate:
    """Share of samples for which model and reference predict the same class. On the forget set: *completeness*.

        mean over samples, and over the pool, of [argmax p_w = argmax p_R]        ideal 1; in practice the floor

    Of equal classes the first counts as predicted. Completeness: Cao and Yang 2015, doi:10.1109/SP.2015.35.

    Args:
        scores: `[N, K]`, logits or log-probabilities of the model.
        references: `[N, K]`, or a list of such: the same samples in the same order.

    Returns:
        A share, with Wilson's interval for one reference and a normal one for several; NaN with a reason without a
        sample or a reference, or with NaN rows.

    Raises:
        HAMUValueError: If an argument is of another shape.

    Example:
        >>> print(agreement(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])))
        0.5 [0.09453, 0.9055] (n = 2, ideal 1)
    """
    return _measure("agreement", scores, references)


def activation_distance(scores: Any, references: Any) -> Estimate:
    """Mean Euclidean distance between the probabilities of model and reference.

        mean over samples, and over the pool, of ||p_w - p_R||_2, in [0, sqrt 2]        ideal 0; in practice the floor

    Chundawat et al. 2022, arXiv 2205.08096. SUPREME
    (pedroandreou/supreme-unlearning) takes the root of the mean of the *squared* distances, which is larger.

    Args:
        scores: `[N, K]`, logits or log-probabilities of the model.
        references: `[N, K]`, or a list of such: the same samples in the same order.

    Returns:
        The mean, with an interval over samples; NaN with a reason without a sample or a reference, or with NaN rows.

    Raises:
        HAMUValueError: If an argument is of another shape.

    Example:
        >>> p, q = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> round(float(activation_distance(p.log(), q.log())), 4)
        0.7071
    """
    return _measure("activation", scores, references)


def zrf(scores: Any, teacher: Any) -> Estimate:
    """Zero retrain forgetting: how much the predictions on the forget set are those of a model that knows nothing.

        ZRF = 1 - mean over samples of JS(p_w, p_teacher) / ln 2, in [0, 1]

    Chundawat et al. 2022, arXiv 2205.08096. The teacher is a randomly initialised model. The ideal value is the
    retrained model's own ZRF, not 1: a model that never saw a class still answers something other than noise. Published
    code computes JS by `F.kl_div(log p, m)` with its default reduction, the reverse direction divided by the number of
    classes, and so prints values near 1.

    Args:
        scores: `[N, K]`, logits or log-probabilities of the model.
        teacher: `[N, K]`, those of the random teacher, or a list of several teachers'.

    Returns:
        The number, with an interval over samples; NaN with a reason without a sample or a teacher, or with NaN rows.

    Raises:
        HAMUValueError: If an argument is of another shape.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> float(zrf(logits, logits))
        1.0
    """
    return _measure("zrf", scores, teacher)


def log_odds(scores: Any, labels: Any) -> Tensor:
    """Log-odds of the label, `phi`, of each sample: how sure the model is of it. Also called margin.

        phi = log p_y / (1 - p_y) = z_y - logsumexp_{j != y} z_j        unit: nats

    The second form loses no digits where p_y is near 1. Carlini et al. 2022, arXiv 2112.03570.

    Args:
        scores: `[N, K]`, logits or log-probabilities.
        labels: integer `[N]`, classes from 0 to K - 1.

    Returns:
        `[N]`; infinite where p_y is exactly 0 or 1, NaN where the label is none of the classes (-100, say).

    Raises:
        HAMUValueError: If the shapes are others.

    Example:
        >>> log_odds(torch.tensor([[3.0, 1.0], [60.0, 0.0]]), torch.tensor([0, 0]))
        tensor([ 2., 60.], dtype=torch.float64)
    """
    log_p = as_log_probs("scores", scores)
    return phi_of(log_p, as_labels(labels, log_p))


def log_odds_distance(scores: Any, references: Any, labels: Any) -> Estimate:
    """Mean absolute difference of the log-odds of the label, between a model and references.

        mean over samples, and over the pool, of |phi_w - phi_R|, nats        ideal 0; in practice the floor

    A shift of the label's logit by `c` counts as `c`, however sure the model is: where probabilities are near 0 or 1,
    JS and accuracies do not see it. Two infinite values of one sign are equal.

    Args:
        scores: `[N, K]`, logits or log-probabilities of the model.
        references: `[N, K]`, or a list of such: the same samples in the same order.
        labels: integer `[N]`.

    Returns:
        The mean, with an interval over samples; NaN with a reason without a sample or a reference, or with NaN rows.

    Raises:
        HAMUValueError: If an argument is of another shape.

    Example:
        >>> model, retrained = torch.tensor([[5.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [2.0, 0.0]])
        >>> float(log_odds_distance(model, retrained, torch.tensor([0, 0])))
        2.0
    """
    return _measure("log_odds", scores, references, labels)


def _pair(p: Any, q: Any) -> tuple[Tensor, Tensor]:
    log_p, log_q = as_log_probs("p", p), as_log_probs("q", q)
    check_same_shape("q", log_q, log_p)
    return log_p, log_q.to(log_p.device)


def _measure(name: str, scores: Any, references: Any, labels: Any = None) -> Estimate:
    """The mean of a comparison over the pool, sample by sample, and then over the samples."""
    distance, log_p = DISTANCES[name], as_log_probs("scores", scores)
    pool, n = as_pool(references, log_p), (len(log_p),)
    classes = as_labels(labels, log_p) if distance.needs_labels else None
    if not pool:
        return undefined("no reference was given", n, distance.ideal)
    for whose, members in (("the model", [log_p]), ("the references", pool)):
        reason = why_not(torch.stack([member.sum(dim=1) for member in members]).sum(dim=0), f"predictions of {whose}")
        if reason is not None:
            return undefined(reason, n, distance.ideal)
    return distance.summarise(distance.compare_all(log_p, pool, classes))
