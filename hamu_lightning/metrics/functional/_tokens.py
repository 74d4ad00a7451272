"""What a language model knows of a text: losses, membership scores and memorisation, token by token.

Logits are `[N, T, V]` and labels `[N, T]`, aligned: `labels[n, t]` is what `logits[n, t]` should predict, and -100
where there is nothing to predict, as for padding and the question. A causal model's labels have to be moved by one
position beforehand. Whether the end-of-text token counts is up to the labels; published code differs (open-unlearning
leaves out the last labelled token of exact memorisation, extraction strength and Min-K%).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamu_lightning.checks import check_number, check_positive, check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import widest_float
from hamu_lightning.metrics.functional._estimate import Estimate, mean_estimate, undefined, why_not
from hamu_lightning.metrics.functional._inputs import as_texts, as_vector

_IGNORED = -100


class TokenLosses(NamedTuple):
    """Losses of texts, nats."""

    per_token: Estimate
    """Mean over all tokens: long texts count more. No interval: tokens of one text hang together."""
    per_sample: Estimate
    """Mean over texts of the mean over each one's tokens."""
    samples: Tensor
    """`[N]`, the mean over each text's tokens; NaN for a text without labels."""


def token_losses(logits: Any, labels: Any) -> TokenLosses:
    """Cross-entropy of texts, per token and per text.

        per token    sum over texts and tokens of -log p(x_t | x_<t) / number of tokens
        per text     mean over texts of (sum over tokens of -log p(x_t | x_<t) / number of its tokens)

    The two differ where lengths do, and published tables seldom say which one they hold.

    Args:
        logits: `[N, T, V]`, logits or log-probabilities.
        labels: integer `[N, T]`, aligned, -100 where there is none.

    Returns:
        Both means, and one loss per text; NaN with a reason where a text has no labels.

    Raises:
        HAMUValueError: If the shapes are others.

    Example:
        >>> losses = token_losses(torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [3, -100, -100]]))
        >>> print(losses.per_token, losses.per_sample, sep="; ")
        1.386 (n = 4); 1.386 [1.386, 1.386] (n = 2)
    """
    texts = [-_of_labels(log_p, classes) for log_p, classes in _texts(logits, labels)]
    samples = _stack([text.mean() if len(text) else torch.full_like(text.sum(), math.nan) for text in texts])
    reason = _why_no_texts(texts)
    count = sum(map(len, texts))
    if reason is not None:
        return TokenLosses(undefined(reason, (count,)), undefined(reason, (len(texts),)), samples)
    per_token = Estimate(float(_stack([text.sum() for text in texts]).sum() / count), n=(count,))
    return TokenLosses(per_token, mean_estimate(samples), samples)


def min_k_scores(logits: Any, labels: Any, k: float = 0.2) -> Tensor:
    """Min-K%: the mean log-probability of the least likely tokens of each text (Shi et al. 2024, arXiv 2310.16789).

        mean over the max(1, floor(k T)) lowest of log p(x_t | x_<t), nats; higher means member

    A number without its `k` cannot be compared: the paper takes 0.2, MUSE and open-unlearning 0.4.

    Args:
        logits: `[N, T, V]`, logits or log-probabilities.
        labels: integer `[N, T]`, aligned, -100 where there is none.
        k: The share of the tokens, above 0 and at most 1.

    Returns:
        `[N]`, NaN for a text without labels. For `auc(forget, holdout)`.

    Raises:
        HAMUValueError: If the shapes are others, or `k` is out of range.

    Example:
        >>> logits = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]]).log()
        >>> min_k_scores(logits, torch.tensor([[0, 0, 0]]), k=0.34).exp()
        tensor([0.2000], dtype=torch.float64)
    """
    k = _check_share(k)
    return _stack([_mean_of_lowest(_of_labels(log_p, classes), k) for log_p, classes in _texts(logits, labels)])


def min_k_plus_plus_scores(logits: Any, labels: Any, k: float = 0.2) -> Tensor:
    """Min-K%++: the same of standardised log-probabilities (Zhang et al. 2025, arXiv 2404.02936).

        z_t = (log p(x_t) - mu_t) / sigma_t
        mu_t = sum_v p(v) log p(v),    sigma_t^2 = sum_v p(v) (log p(v) - mu_t)^2

    and the mean of the max(1, floor(k T)) lowest; higher means member. Where p is uniform, sigma is 0 and z counts as
    0. (open-unlearning takes sigma^2 for at least 1e-6.)

    Args:
        logits: `[N, T, V]`, logits or log-probabilities.
        labels: integer `[N, T]`, aligned, -100 where there is none.
        k: The share of the tokens, above 0 and at most 1.

    Returns:
        `[N]`, NaN for a text without labels. For `auc(forget, holdout)`.

    Raises:
        HAMUValueError: If the shapes are others, or `k` is out of range.

    Example:
        >>> min_k_plus_plus_scores(torch.zeros(1, 3, 5), torch.tensor([[0, 1, 2]]))
        tensor([0.], dtype=torch.float64)
    """
    k = _check_share(k)
    return _stack([_mean_of_lowest(_standardise(log_p, classes), k) for log_p, classes in _texts(logits, labels)])


def zlib_scores(losses: Any, texts: Sequence[str]) -> Tensor:
    """Loss by the length of the compressed text (Carlini et al. 2021, arXiv 2012.07805).

        -loss / len(zlib(text)), nats per byte; higher means member

    Args:
        losses: `[N]`, one loss per text, such as `token_losses(...).samples`.
        texts: The N texts.

    Returns:
        `[N]`. For `auc(forget, holdout)`.

    Raises:
        HAMUValueError: If there are not as many texts as losses.

    Example:
        >>> zlib_scores([2.0, 2.0], ["aaaaaaaaaaaaaaaa", "the quick brown f"]).argmin()
        tensor(0)
    """
    values = as_vector("losses", losses)
    check_type("texts", texts, list | tuple, "a list of strings")
    if len(texts) != len(values) or not all(isinstance(text, str) for text in texts):
        raise HAMUValueError(f"Expected `texts` to hold {len(values)} strings, but got {len(texts)} items.")
    lengths = [len(zlib.compress(text.encode())) for text in texts]
    return -values / torch.tensor(lengths, dtype=values.dtype, device=values.device)


def reference_scores(losses: Any, reference_losses: Any) -> Tensor:
    """How much less the model loses than a reference model does; higher means member (Carlini et al. 2021, 2012.07805).

        loss_ref - loss_w, nats

    Args:
        losses: `[N]`, one loss per text.
        reference_losses: `[N]`, those of a model that was not trained on the texts.

    Returns:
        `[N]`. For `auc(forget, holdout)`.

    Raises:
        HAMUValueError: If the shapes differ.

    Example:
        >>> reference_scores([1.0, 2.0], [3.0, 2.0])
        tensor([2., 0.], dtype=torch.float64)
    """
    ours, theirs = as_vector("losses", losses), as_vector("reference_losses", reference_losses)
    if ours.shape != theirs.shape:
        raise HAMUValueError(
            f"Expected `reference_losses` to be of shape {list(ours.shape)}, but got {list(theirs.shape)}."
        )
    return theirs.to(ours.device) - ours


def gradient_norm_scores(losses: Tensor, parameters: Iterable[Tensor], p: float = 2.0) -> Tensor:
    """Length of the gradient of each sample's loss, negated: higher means member.

        -mean over parameters i of ||d loss / d w_i||_p        (as in open-unlearning's `mia/gradnorm.py`)

    Args:
        losses: `[N]`, one loss per sample, with their graph.
        parameters: The weights to differentiate by; one that a loss does not depend on counts as 0.
        p: The norm.

    Returns:
        `[N]`, detached. For `auc(forget, holdout)`. N backward passes.

    Raises:
        HAMUValueError: If `losses` is no vector with a graph, or there is no parameter.

    Example:
        >>> weight = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> gradient_norm_scores((torch.tensor([[1.0, 0.0], [3.0, 4.0]]) * weight).sum(dim=1), [weight])
        tensor([-1., -5.], dtype=torch.float64)
    """
    weights = list(parameters)
    p = check_positive("p", p)
    if not isinstance(losses, Tensor) or losses.ndim != 1 or not losses.requires_grad or not weights:
        raise HAMUValueError(
            "Expected `losses` to be of shape [N] with a graph, and at least one parameter. "
            "Compute the losses with gradients enabled and `reduction='none'`."
        )
    scores = []
    for loss in losses:
        grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        norms = [grad.to(widest_float(grad.device)).norm(p) for grad in grads if grad is not None]
        scores.append(-torch.stack(norms).sum() / len(weights))
    return _stack(scores).to(losses.device)


def exact_memorization(logits: Any, labels: Any) -> Estimate:
    """Share of a text's tokens that greedy decoding gets right after the true beginning (Tirumala 2022, 2205.10770).

        mean over texts of mean over tokens of [argmax p(. | x_<t) = x_t]        ideal: that of the retrained model

    Args:
        logits: `[N, T, V]`, logits or log-probabilities.
        labels: integer `[N, T]`, aligned, -100 where there is none.

    Returns:
        A number in [0, 1], with an interval over texts; NaN with a reason where a text has no labels.

    Raises:
        HAMUValueError: If the shapes are others.

    Example:
        >>> logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 0]]), 3).float()
        >>> float(exact_memorization(logits, torch.tensor([[0, 1, 2, 1]])))
        0.75
    """
    return _mean_over_texts(_hits(logits, labels), lambda hits: float(hits.double().mean()))


def extraction_strength(logits: Any, labels: Any) -> Estimate:
    """How short a true beginning suffices for greedy decoding to give the rest (Carlini et al. 2021, arXiv 2012.07805).

        ES = 1 - k / T,  k the smallest number of tokens after which all argmax are right        ideal: as retrained

    0 where even the last token is wrong: k = T. (open-unlearning gives 1 / T there.)

    Args:
        logits: `[N, T, V]`, logits or log-probabilities.
        labels: integer `[N, T]`, aligned, -100 where there is none.

    Returns:
        A number in [0, 1], with an interval over texts; NaN with a reason where a text has no labels.

    Raises:
        HAMUValueError: If the shapes are others.

    Example:
        >>> logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 0]]), 3).float()
        >>> float(extraction_strength(logits, torch.tensor([[1, 1, 2, 0]])))
        0.75
    """

    def strength(hits: Tensor) -> float:
        # The length of the run of hits at the end.
        return int(hits.flip(0).long().cumprod(0).sum()) / len(hits)

    return _mean_over_texts(_hits(logits, labels), strength)


def _texts(logits: Any, labels: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each text the log-probabilities `[t, V]` and labels `[t]` where there are labels. One is widened at a time."""
    scores, classes = as_texts(logits, labels)
    there = classes != _IGNORED
    if bool((there & ((classes < 0) | (classes >= scores.shape[2]))).any()):
        raise HAMUValueError(f"Expected `labels` to be -100 or below {scores.shape[2]}, but got others.")
    for text, label, mask in zip(scores, classes, there, strict=True):
        yield text[mask].to(widest_float(scores.device)).log_softmax(dim=-1), label[mask]


def _of_labels(log_p: Tensor, labels: Tensor) -> Tensor:
    return log_p.gather(1, labels[:, None])[:, 0]


def _standardise(log_p: Tensor, labels: Tensor) -> Tensor:
    p, finite = log_p.exp(), torch.where(log_p == -math.inf, 0.0, log_p)
    mean = (p * finite).sum(dim=1)
    sd = (p * (finite - mean[:, None]).square()).sum(dim=1).sqrt()
    difference = _of_labels(log_p, labels) - mean
    # Of a uniform distribution both are 0 but for rounding: a mean of V equal numbers has about this much of it.
    rounding = 1e-13 * mean.abs()
    return torch.where((sd <= rounding) & (difference.abs() <= rounding), 0.0, difference / sd)


def _mean_of_lowest(values: Tensor, k: float) -> Tensor:
    # 1e-9: 0.29 * 100 is 28.999999999999996.
    count = max(1, math.floor(k * len(values) + 1e-9))
    # Sorted, a NaN is the last, and would not be seen.
    return torch.where(values.isnan().any(), torch.nan, values.sort().values[:count].mean())


def _hits(logits: Any, labels: Any) -> list[Tensor]:
    return [_where_right(log_p, classes) for log_p, classes in _texts(logits, labels)]


def _where_right(log_p: Tensor, labels: Tensor) -> Tensor:
    right = (log_p.argmax(dim=1) == labels).to(log_p.dtype)
    # argmax takes NaN for the largest.
    return torch.where(log_p.isnan().any(dim=1), torch.nan, right)


def _mean_over_texts(texts: list[Tensor], measure: Any) -> Estimate:
    reason = _why_no_texts(texts)
    if reason is not None:
        return undefined(reason, (len(texts),))
    return mean_estimate([measure(text) for text in texts], "texts", limits=(0, 1))


def _why_no_texts(texts: list[Tensor]) -> str | None:
    empty = sum(len(text) == 0 for text in texts)
    if empty:
        return f"{empty} of {len(texts)} texts have no labels"
    return why_not(_stack([text.sum() for text in texts]), "texts")


def _stack(numbers: list[Tensor]) -> Tensor:
    return torch.stack(numbers) if numbers else torch.zeros(0, dtype=torch.float64)


def _check_share(k: float) -> float:
    return check_number("k", k, above=0, most=1, wanted="above 0 and at most 1", cure="The paper takes 0.2.")
