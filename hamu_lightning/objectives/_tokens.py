"""Objectives that weigh the tokens of an answer: those that are still remembered, or that say much, count more."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import softplus
from typing_extensions import override

from hamu_lightning.checks import check_number, check_optional, check_positive
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives._base import BatchPass, Objective, check_objective, to_raise
from hamu_lightning.objectives._odds import log_odds_of_labels
from hamu_lightning.objectives._outputs import Outputs, as_outputs
from hamu_lightning.objectives._prediction import log_p_of_labels

# Nodes of the quadrature for SatImp's value: exact where the first exponent is a whole number up to 32.
_NODES = 16


class TokenObjective(Objective):
    """The mean over a sample's tokens of something that is known of each token; then the mean over samples.

    Args:
        outputs: How to ask the module.
    """

    is_nonnegative = True

    def __init__(self, *, outputs: Outputs | None = None) -> None:
        self.outputs = as_outputs(outputs)

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        prediction = batch.predict(self.outputs)
        return prediction.mean_over_places(prediction.by_rows(self.tokens))

    @abstractmethod
    def tokens(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute what is raised, `[...]` in nats, from logits `[..., V]` and labels `[...]`."""


class WGA(TokenObjective):
    """Weighted gradient ascent (Wang et al. 2025, ICLR, arXiv 2502.19301), as a quantity that is bounded.

        to raise   (1 - p^alpha) / alpha,    p = p(token | those before it)

    per token, the mean over a sample's tokens, the mean over samples. Its gradient is that of the paper's WGA: p^alpha,
    held fixed, times that of -log p. The paper's own number, -p^alpha log p, falls again where a token is forgotten:
    no step could be held to what it promised. As alpha -> 0 it becomes the cross-entropy. A token that is forgotten has
    no gradient; at 1 / alpha forgetting has ended.

    Args:
        alpha: The larger, the sooner forgetting a token ends.
        outputs: How to ask the module.

    Raises:
        HAMUValueError: If `alpha` is not positive.

    Example:
        >>> WGA(alpha=2.0).tokens(torch.tensor([0.5, 0.5]).log(), torch.tensor(0))
        tensor(0.3750)
    """

    def __init__(self, alpha: float = 1.0, *, outputs: Outputs | None = None) -> None:
        super().__init__(outputs=outputs)
        self.alpha = check_positive("alpha", alpha)

    @override
    def tokens(self, logits: Tensor, labels: Tensor) -> Tensor:
        return -torch.expm1(self.alpha * log_p_of_labels(logits, labels)) / self.alpha


class SatImp(TokenObjective):
    """Saturation and importance (Yang et al. 2025, ICML, arXiv 2505.11953), as a quantity that is bounded.

        to raise   integral from p to 1 of q^(saturation - 1) (1 - q)^importance dq,    p = p(token | those before it)

    per token, the mean over a sample's tokens, the mean over samples. Its gradient is that of the paper's SatImp:
    p^saturation (1 - p)^importance, held fixed, times that of -log p. `importance=0` is `WGA(alpha=saturation)`; the
    larger it is, the less those tokens count that can hardly be anything else.

    Args:
        saturation: beta_1; 5 in the published code.
        importance: beta_2; 0.1 in the published code.
        outputs: How to ask the module.

    Raises:
        HAMUValueError: If `saturation` is not positive, or `importance` negative.

    Example:
        >>> SatImp(1.0, 1.0).tokens(torch.tensor([0.5, 0.5]).log(), torch.tensor(0))
        tensor(0.1250)
    """

    def __init__(self, saturation: float = 5.0, importance: float = 0.1, *, outputs: Outputs | None = None) -> None:
        super().__init__(outputs=outputs)
        self.saturation = check_positive("saturation", saturation)
        self.importance = check_number("importance", importance, least=0)

    @override
    def tokens(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = log_p_of_labels(logits, labels).clamp(max=0)
        known = log_p.detach()
        rest = -torch.expm1(known)
        weight = (self.saturation * known).exp() * rest**self.importance
        # The value is a quadrature, the slope is exact.
        return self._integrate(rest) - weight * (log_p - known)

    def _integrate(self, rest: Tensor) -> Tensor:
        """The integral from 0 to 1 - p of (1 - u)^(saturation - 1) u^importance du."""
        nodes, weights = (part.to(rest) for part in self._quadrature)
        inside = (1 - rest.unsqueeze(-1) * nodes).clamp(min=torch.finfo(rest.dtype).tiny) ** (self.saturation - 1)
        return rest ** (self.importance + 1) * (inside * weights).sum(-1)

    @cached_property
    def _quadrature(self) -> tuple[Tensor, Tensor]:
        return jacobi_quadrature(self.importance, _NODES)


class TokenCap(TokenObjective):
    """The cross-entropy with a cap for each token: those above it have no gradient, the others go on.

        to raise   min(-log p, level)

    per token, the mean over a sample's tokens, the mean over samples. `LossCap(CrossEntropy(), level)` caps samples:
    there one token that is far above makes the others rest.

    Args:
        level: In nats; default: the log of the number of classes, the cross-entropy of a guess.
        outputs: How to ask the module.

    Raises:
        HAMUValueError: If `level` is not positive.

    Example:
        >>> TokenCap(0.5).tokens(torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([0, 0]))
        tensor([0.5000, 0.1054])
    """

    def __init__(self, level: float | None = None, *, outputs: Outputs | None = None) -> None:
        super().__init__(outputs=outputs)
        self.level = check_optional(check_positive, "level", level)

    @override
    def tokens(self, logits: Tensor, labels: Tensor) -> Tensor:
        level = math.log(logits.shape[-1]) if self.level is None else self.level
        return -log_p_of_labels(logits, labels).clamp(min=-level)


class EntropyWeighted(TokenCap):
    """The capped cross-entropy, in which tokens count as much as the model is unsure of them.

        to raise   (H / log V) min(-log p, level),    H the entropy of p(. | those before the token), held fixed

    per token, the mean over a sample's tokens, the mean over samples. Words that only the grammar asks for have little
    entropy. Weighing by it is the idea of Koh et al. 2026 (ACL, arXiv 2604.17785); this form of it is ours. Where a
    model has its answers by heart, all of its entropies are small, and so is what is raised.

    Args:
        level: As for `TokenCap`.
        outputs: How to ask the module.

    Raises:
        HAMUValueError: If `level` is not positive.

    Example:
        >>> EntropyWeighted().tokens(torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([0, 0]))
        tensor([0.6931, 0.0494])
    """

    @override
    def tokens(self, logits: Tensor, labels: Tensor) -> Tensor:
        known = logits.detach().log_softmax(-1)
        entropy = torch.special.entr(known.exp()).sum(-1)
        weight: Tensor = entropy / math.log(logits.shape[-1])
        return weight * super().tokens(logits, labels)


class CEU(TokenObjective):
    """Cross-entropy unlearning (Yang 2025, arXiv 2503.01224): learn one's own prediction without the label.

        to raise   -KL(s || p) = log(1 - p_y) <= 0,    s = p without the label y, renormalised, held fixed

    per token, the mean over a sample's tokens, the mean over samples. The paper's loss, the cross-entropy with s,
    differs by the entropy of s, and has the same gradient. A token that is forgotten has none. `DELETE` is the same
    with the reference's s. The published code leaves the first token of each answer out: make its label -100 for that.

    Args:
        outputs: How to ask the module.

    Example:
        >>> CEU().tokens(torch.tensor([0.5, 0.5]).log(), torch.tensor(0))
        tensor(-0.6931)
    """

    is_nonnegative = False

    @override
    def tokens(self, logits: Tensor, labels: Tensor) -> Tensor:
        return to_raise(softplus(log_odds_of_labels(logits, labels)))


class TokenMean(Objective):
    """An objective in which each token counts alike, in the place of each sample.

        sum over samples of (value * number of its tokens)  /  number of the batch's tokens, or `tokens_per_batch`

    For objectives that are means over a sample's tokens: `CrossEntropy`, `WGA`, `ReferenceKL`, `UNDIAL`, ... Most
    modules' own loss is such a mean. With accumulation, and on several processes, Lightning takes the mean over
    batches, in which tokens of short batches count more; with `tokens_per_batch` the gradient is that of the mean over
    all tokens, times a constant factor, as with `CausalLMModule(tokens_per_batch=...)`.

    Args:
        objective: What is summed up. It has `outputs`.
        tokens_per_batch: By what sums are divided, such as the mean number of answer tokens in a batch.

    Raises:
        HAMUValueError: If the objective asks for no tokens, or the number is not positive.
    """

    _parts = ("objective",)

    def __init__(self, objective: Objective, tokens_per_batch: float | None = None) -> None:
        check_objective("objective", objective)
        if not callable(getattr(objective, "outputs", None)):
            raise HAMUValueError(
                f"Expected an objective that looks at tokens, but got {type(objective).__name__}. "
                "CrossEntropy() is the module's loss as one."
            )
        self.objective = objective
        self.outputs: Outputs = objective.outputs  # type: ignore[attr-defined]
        self.tokens_per_batch = check_optional(check_positive, "tokens_per_batch", tokens_per_batch)
        self.is_forget_only, self.is_nonnegative = objective.is_forget_only, objective.is_nonnegative

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        counts = batch.predict(self.outputs).count_places()
        total = counts.sum().clamp(min=1) if self.tokens_per_batch is None else self.tokens_per_batch
        return self.objective.samples(batch) * counts * len(counts) / total


def jacobi_quadrature(power: float, nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights for the integral from 0 to 1 of f(s) s^power ds, exact for polynomials of degree 2 n - 1.

    Golub and Welsch 1969: nodes are the eigenvalues of the matrix of the Jacobi polynomials' recurrence.

    Args:
        power: At least 0.
        nodes: n.

    Returns:
        Two tensors `[n]`, float64.

    Example:
        >>> nodes, weights = jacobi_quadrature(1.0, 4)
        >>> round(float((nodes**3 * weights).sum()), 12)
        0.2
    """
    k = torch.arange(1, nodes, dtype=torch.float64)
    b, twice = power, 2 * torch.arange(nodes, dtype=torch.float64) + power
    centre = torch.cat([torch.tensor([b / (b + 2)], dtype=torch.float64), b**2 / (twice[1:] * (twice[1:] + 2))])
    side = (4 * k**2 * (k + b) ** 2 / ((2 * k + b) ** 2 * ((2 * k + b) ** 2 - 1))).sqrt()
    matrix = torch.diag(centre) + torch.diag(side, 1) + torch.diag(side, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return (values + 1) / 2, vectors[0] ** 2 / (b + 1)
