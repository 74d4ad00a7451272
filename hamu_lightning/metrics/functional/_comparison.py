"""Comparisons of two log-probabilities `[N, K]`, sample by sample, and what is said of the whole set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional._estimate import Estimate, Range, mean_estimate, rate_estimate
from hamu_lightning.metrics.functional._inputs import as_labels, as_log_probs, as_pool

Compare: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_LN2 = math.log(2)


@dataclass(frozen=True)
class Distance:
    """A comparison of a model with references: one number per sample, and their mean.

    Args:
        compare: `(log_p, log_q, labels) -> [N]` for the model's and a reference's log-probabilities.
        limits: The smallest and the largest number possible.
        ideal: The mean of a model at its reference; None where the retrained model's own is the ideal.
        needs_labels: Whether it looks at the labels.
        is_share: Whether a sample's number is 0 or 1 for each reference.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> DISTANCES["kl_reverse"].samples(p, [q, p])
        tensor([0.0719], dtype=torch.float64)
    """

    compare: Compare
    limits: Range
    ideal: float | None = 0.0
    needs_labels: bool = False
    is_share: bool = False

    def samples(self, scores: Any, references: Any, labels: Any = None) -> Tensor:
        """Return the mean over the references for each sample, `[N]`. Nothing is read on the host.

        Args:
            scores: `[N, K]`, logits or log-probabilities of the model.
            references: `[N, K]`, or a list of at least one such.
            labels: integer `[N]`, where they are needed.

        Raises:
            HAMUValueError: If the shapes are others, or there is no reference.
        """
        log_p = as_log_probs("scores", scores)
        pool = as_pool(references, log_p)
        if not pool:
            raise HAMUValueError("Expected `references` to hold at least one reference, but got none.")
        return self.compare_all(log_p, pool, as_labels(labels, log_p) if self.needs_labels else None)

    def compare_all(self, log_p: Tensor, pool: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """Return the same for log-probabilities and labels that have been checked."""
        return torch.stack([self.compare(log_p, member, labels) for member in pool]).mean(dim=0)

    def summarise(self, values: Tensor) -> Estimate:
        """Return the mean of what `samples` returned, with an interval."""
        # Of several references the numbers may lie between 0 and 1.
        if self.is_share and values.numel() and bool(((values == 0) | (values == 1)).all()):
            return rate_estimate(int(values.sum()), values.numel(), ideal=self.ideal)
        return mean_estimate(values, "distances", ideal=self.ideal, limits=self.limits)


def kl_of(log_p: Tensor, log_q: Tensor, labels: Tensor | None = None) -> Tensor:
    """KL(p || q) of each sample, nats."""
    # A sum of terms of both signs: rounding may leave it a little below 0, which it cannot be.
    return _signed_kl(log_p, log_q).clamp_min(0)


def js_of(log_p: Tensor, log_q: Tensor, labels: Tensor | None = None) -> Tensor:
    """JS(p, q) of each sample, nats."""
    middle = torch.logaddexp(log_p, log_q) - _LN2
    # In [0, ln 2] but for rounding.
    return ((_signed_kl(log_p, middle) + _signed_kl(log_q, middle)) / 2).clamp(0, _LN2)


def phi_of(log_p: Tensor, labels: Tensor) -> Tensor:
    """Log-odds of the label of each sample; NaN where the label is no class."""
    is_class = (labels >= 0) & (labels < log_p.shape[1])
    index = torch.where(is_class, labels, 0)[:, None]
    others = log_p.scatter(1, index, -math.inf).logsumexp(dim=1)
    return torch.where(is_class, log_p.gather(1, index)[:, 0] - others, torch.nan)


def _signed_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    # 0 log 0 is 0 here, and NaN in floating point.
    return torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(dim=1)


def _is_same_class(log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
    same = (log_p.argmax(dim=1) == log_q.argmax(dim=1)).to(log_p.dtype)
    # argmax takes NaN for the largest.
    return torch.where(log_p.isnan().any(dim=1) | log_q.isnan().any(dim=1), torch.nan, same)


def _phi_gap(log_p: Tensor, log_q: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    phi, other = phi_of(log_p, labels), phi_of(log_q, labels)
    # Two infinite values of one sign are equal, and their difference is NaN in floating point.
    return torch.where(phi == other, 0.0, (phi - other).abs())


DISTANCES: Mapping[str, Distance] = MappingProxyType(
    {
        "js": Distance(lambda p, q, _: js_of(p, q) / _LN2, (0, 1)),
        "js_nats": Distance(js_of, (0, _LN2)),
        "kl_forward": Distance(lambda p, q, _: kl_of(q, p), (0, math.inf)),
        "kl_reverse": Distance(kl_of, (0, math.inf)),
        "agreement": Distance(_is_same_class, (0, 1), ideal=1.0, is_share=True),
        "activation": Distance(lambda p, q, _: (p.exp() - q.exp()).norm(dim=1), (0, math.sqrt(2))),
        "zrf": Distance(lambda p, q, _: 1 - js_of(p, q) / _LN2, (0, 1), ideal=None),
        "log_odds": Distance(_phi_gap, (0, math.inf), needs_labels=True),
    }
)
"""All of them by name; `js` and `zrf` as shares of ln 2, the other divergences in nats."""
