"""What a language model knows of texts, batch by batch: memorisation, Min-K%, PrivLeak, truth ratios."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from typing_extensions import override

from hamu_lightning.checks import check_choice, check_number
from hamu_lightning.gramian import widest_float
from hamu_lightning.metrics._membership import LossAttack
from hamu_lightning.metrics._samples import SampleMetric
from hamu_lightning.metrics.functional import (
    Estimate,
    as_texts,
    mean_estimate,
    priv_leak,
    truth_ratio,
    truth_ratio_of_forgotten,
    truth_ratio_of_kept,
)

_IGNORED = -100
TruthRatioNumber = Literal["forgotten", "kept"]
TruthRatioMean = Literal["arithmetic", "geometric"]


class _Tokens(NamedTuple):
    """Of each token of `N` texts, `[N, T]`."""

    log_p: Tensor
    """Log-probability of the label, nats; NaN where the label is no token of the vocabulary."""
    hits: Tensor
    """1 where it is the likeliest, else 0; NaN where that is not defined."""
    there: Tensor
    """Whether there is a label."""


class TextMetric(SampleMetric):
    """What these share: one number in [0, 1] of each text, and its mean over texts."""

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    @override
    def update(self, logits: Any, labels: Any, ids: Any = None) -> None:
        """Add some texts. Nothing is read on the host.

        Args:
            logits: `[n, T, V]`, logits or log-probabilities.
            labels: integer `[n, T]`, aligned: `labels[i, t]` is what `logits[i, t]` should predict; -100 where there is
                none. T may differ from batch to batch.
            ids: integer `[n]`, as for `JSToReference`.

        Raises:
            HAMUValueError: If the shapes are others, or `ids` no integers.
        """
        self._add(self._score(_read(logits, labels))[:, None], ids)

    @abstractmethod
    def _score(self, tokens: _Tokens) -> Tensor:
        """`[n]`, NaN for a text without labels."""

    @override
    def _summarise(self) -> Estimate:
        return mean_estimate(self._rows(1)[:, 0], "texts", limits=(0, 1))


class ExactMemorization(TextMetric):
    """Share of a text's tokens that greedy decoding gets right; see `functional.exact_memorization`.

        mean over texts of mean over tokens of [argmax p(. | x_<t) = x_t]

    The ideal is the retrained model's. A text without labels makes it NaN.

    Args:
        **options: torchmetrics' own, such as `sync_on_compute`.

    Example:
        >>> metric = ExactMemorization()
        >>> logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 0]]), 3).float()
        >>> metric.update(logits, torch.tensor([[0, 1, 2, 1]]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    @override
    def _score(self, tokens: _Tokens) -> Tensor:
        return tokens.hits.where(tokens.there, 0).sum(dim=1) / tokens.there.sum(dim=1)


class ExtractionStrength(TextMetric):
    """How short a true beginning suffices for the rest; see `functional.extraction_strength`.

        mean over texts of 1 - k / T,  k the smallest number of tokens after which all argmax are right

    The ideal is the retrained model's. A text without labels makes it NaN.

    Args:
        **options: torchmetrics' own, such as `sync_on_compute`.

    Example:
        >>> metric = ExtractionStrength()
        >>> logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 0]]), 3).float()
        >>> metric.update(logits, torch.tensor([[1, 1, 2, 0]]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    @override
    def _score(self, tokens: _Tokens) -> Tensor:
        # The run of hits at the end; a place without a label does not end it.
        run = tokens.hits.where(tokens.there, 1).flip(1).cumprod(dim=1).flip(1)
        return run.where(tokens.there, 0).sum(dim=1) / tokens.there.sum(dim=1)


class MinK(LossAttack):
    """AUC of a membership attack by Min-K%, forgotten against held-out texts; see `functional.min_k_scores`.

        score(text) = mean over the max(1, floor(k T)) lowest of log p(x_t | x_<t)
        AUC = P(score(forget) > score(holdout)) + 1/2 P(score(forget) = score(holdout))

    Ideal 0.5, as that of a retrained model. Say `k` with the number.

    Args:
        k: The share of the tokens, above 0 and at most 1. The paper takes 0.2, MUSE 0.4.
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If `k` is out of range.

    Example:
        >>> metric = MinK(k=0.5)
        >>> logits = torch.tensor([[[4.0, 0.0]], [[1.0, 0.0]]])
        >>> metric.update(logits, torch.tensor([[0], [0]]), is_member=torch.tensor([True, False]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    def __init__(self, k: float = 0.2, **options: Any) -> None:
        super().__init__(**options)
        self.k = check_number("k", k, above=0, most=1, wanted="above 0 and at most 1", cure="The paper takes 0.2.")

    @override
    def update(self, logits: Any, labels: Any, is_member: Tensor | bool, ids: Any = None) -> None:
        """Add some texts. Nothing is read on the host.

        Args:
            logits: `[n, T, V]`, as for `ExactMemorization`.
            labels: integer `[n, T]`, -100 where there is none.
            is_member: boolean `[n]`, True for texts to forget and False for held-out ones, or one bool for all.
            ids: integer `[n]`, the number of each text in its own data set.

        Raises:
            HAMUValueError: If the shapes are others.
        """
        self._add_losses(-_mean_of_lowest(_read(logits, labels), self.k), is_member, ids)


class PrivLeak(MinK):
    """PrivLeak of MUSE: how far the AUC of Min-K% is from a retrained model's, percent; see `functional.priv_leak`.

        (A_w - A_R) / A_R x 100,    A = 1 - AUC        ideal 0

    Below 0 forgotten texts still look like members, above 0 they stand out as unknown.

    Args:
        retrained: The retrained model's AUC under the same `k`; without one 0.5, as MUSE's successors take it.
        k: As for `MinK`; MUSE takes 0.4.
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If an argument is out of range.

    Example:
        >>> metric = PrivLeak()
        >>> logits = torch.tensor([[[4.0, 0.0]], [[1.0, 0.0]]])
        >>> metric.update(logits, torch.tensor([[0], [0]]), is_member=torch.tensor([True, False]))
        >>> metric.compute()
        tensor(-100., dtype=torch.float64)
    """

    ideal = 0.0
    plot_lower_bound = -100.0
    plot_upper_bound = None

    def __init__(self, retrained: float = 0.5, k: float = 0.4, **options: Any) -> None:
        super().__init__(k, **options)
        self.retrained = check_number("retrained", retrained, least=0, most=1)

    @override
    def _summarise(self) -> Estimate:
        return priv_leak(super()._summarise(), self.retrained)


class TruthRatio(SampleMetric):
    """How likely wrong answers are beside right ones, over questions; see `functional.truth_ratio`.

        R = mean over wrong answers a of P(a | q)^(1/|a|)  /  P(right | q)^(1/|right|)
        "forgotten": mean over questions of min(R, 1/R),    "kept": mean of max(0, 1 - R)

    The ideal is the retrained model's.

    Args:
        of: Which of the two.
        mean: "arithmetic" (the paper) or "geometric" (public code), the mean over wrong answers.
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If an argument is none of its choices.

    Example:
        >>> metric = TruthRatio("kept")
        >>> metric.update(torch.tensor([0.5]).log(), torch.tensor([[0.1, 0.4]]).log())
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(
        self, of: TruthRatioNumber = "forgotten", *, mean: TruthRatioMean = "arithmetic", **options: Any
    ) -> None:
        super().__init__(**options)
        check_choice("of", of, get_args(TruthRatioNumber))
        check_choice("mean", mean, get_args(TruthRatioMean))
        self.of, self.mean = of, mean

    @override
    def update(self, paraphrased: Any, perturbed: Any, ids: Any = None) -> None:
        """Add some questions. Nothing is read on the host.

        Args:
            paraphrased: `[n]`, mean log-probability per token of a paraphrase of the right answer, nats.
            perturbed: `[n, A]`, the same of A wrong answers.
            ids: integer `[n]`, as for `JSToReference`.

        Raises:
            HAMUValueError: If the shapes are others, or `ids` no integers.
        """
        self._add(truth_ratio(paraphrased, perturbed, self.mean)[:, None], ids)

    @override
    def _summarise(self) -> Estimate:
        ratios = self._rows(1)[:, 0]
        return truth_ratio_of_forgotten(ratios) if self.of == "forgotten" else truth_ratio_of_kept(ratios)


def _read(logits: Any, labels: Any) -> _Tokens:
    """One text is widened at a time: in float64 the logits of a batch are large."""
    scores, classes = as_texts(logits, labels)
    pairs = [_read_text(text, label) for text, label in zip(scores, classes, strict=True)]
    empty = torch.zeros(0, classes.shape[1], dtype=widest_float(scores.device), device=scores.device)
    log_p, hits = (torch.stack(column) for column in zip(*pairs, strict=True)) if pairs else (empty, empty)
    return _Tokens(log_p, hits, classes != _IGNORED)


def _read_text(text: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    log_p = text.to(widest_float(text.device)).log_softmax(dim=-1)  # [T, V]
    last = log_p.shape[1] - 1
    is_token = (label >= 0) & (label <= last) & ~log_p.isnan().any(dim=1)
    of_label = log_p.gather(1, label.clamp(0, last)[:, None])[:, 0]
    hits = (log_p.argmax(dim=1) == label).to(log_p.dtype)
    return of_label.where(is_token, math.nan), hits.where(is_token, math.nan)


def _mean_of_lowest(tokens: _Tokens, k: float) -> Tensor:
    """`[n]`, NaN for a text without labels, or with a NaN."""
    # Sorted, a NaN is the last, and would not be seen.
    ordered = tokens.log_p.where(tokens.there, math.inf).sort(dim=1).values
    # 1e-9: 0.29 * 100 is 28.999999999999996.
    count = (k * tokens.there.sum(dim=1).to(ordered.dtype) + 1e-9).floor().clamp(min=1)
    is_low = torch.arange(ordered.shape[1], device=ordered.device) < count[:, None]
    is_broken = (tokens.log_p.isnan() & tokens.there).any(dim=1) | ~tokens.there.any(dim=1)
    return (ordered.where(is_low, 0).sum(dim=1) / count).where(~is_broken, math.nan)
