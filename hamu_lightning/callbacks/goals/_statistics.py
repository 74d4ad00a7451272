"""What losses of two draws of samples show beyond chance: the ratio of their means, and whether ranks differ."""

from __future__ import annotations

import torch
from torch import Tensor

from hamu_lightning.metrics.functional import Estimate, membership_auc

_DRAWS = 1000
_CONFIDENCE = 0.95
# Numbers held at once by the bootstrap.
_PIECE = 2**22
# Two retrained models differ in their AUC by more: a difference below that is none.
_NO_DIFFERENCE = 0.02


def estimate_auc(forget: Tensor, held_out: Tensor) -> Estimate:
    """The share of pairs in which the held-out sample has the higher loss, with the interval of a bootstrap.

    Not DeLong's: the bound of what counts as remembered was chosen with this one.
    """
    return membership_auc(forget, held_out, interval="bootstrap", confidence=_CONFIDENCE, samples=_DRAWS)


def looks_remembered(auc: Estimate) -> bool:
    """Whether forgotten samples have lower losses than held-out ones, beyond chance and beyond what matters.

    Example:
        >>> looks_remembered(Estimate(0.6, (0.55, 0.65))), looks_remembered(Estimate(0.6, (0.45, 0.75)))
        (True, False)
    """
    return auc.interval is not None and auc.interval[0] > 0.5 + _NO_DIFFERENCE


def estimate_ratio(after: Tensor, before: Tensor) -> Estimate:
    """The ratio of two means, `[N]` and `[M]` values of two draws of samples, with the interval of a bootstrap.

    Example:
        >>> estimate_ratio(torch.full((4,), 3.0), torch.ones(5)).interval
        (3.0, 3.0)
    """
    tail = (1 - _CONFIDENCE) / 2
    draws = draw_means(after) / draw_means(before, seed=1)
    lower, upper = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    value = float(after.double().mean() / before.double().mean())
    return Estimate(value, (lower, upper), (len(after), len(before)))


def draw_means(values: Tensor, seed: int = 0) -> Tensor:
    """The means of 1,000 draws with replacement, each of as many values as there are."""
    values, generator = values.double(), torch.Generator().manual_seed(seed)
    rows = max(1, _PIECE // len(values))
    counts = [min(rows, _DRAWS - start) for start in range(0, _DRAWS, rows)]
    return torch.cat(
        [values[torch.randint(len(values), (n, len(values)), generator=generator)].mean(dim=1) for n in counts]
    )


def tell(estimate: Estimate) -> str:
    """A number and its interval in words, to three digits.

    Example:
        >>> tell(Estimate(0.61, (0.552, 0.671))), tell(Estimate(2.0))
        ('0.61 (0.552 to 0.671)', '2')
    """
    if estimate.interval is None:
        return f"{estimate.value:.3g}"
    lower, upper = estimate.interval
    return f"{estimate.value:.3g} ({lower:.3g} to {upper:.3g})"
