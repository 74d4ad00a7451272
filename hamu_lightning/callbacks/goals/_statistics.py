"""What losses per sample can show: means and ranks, each with an interval over the choice of samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hamu_lightning.metrics import MembershipAUC

_DRAWS = 1000
_CONFIDENCE = 0.95
# Numbers held at once by the bootstrap.
_PIECE = 2**22
# Two retrained models differ in their AUC by more: a difference below that is none.
_NO_DIFFERENCE = 0.02


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval over the choice of samples, by a bootstrap.

    Example:
        >>> print(Estimate(0.61, 0.552, 0.671))
        0.61 (0.552 to 0.671)
    """

    value: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.lower:.3g} to {self.upper:.3g})"

    @classmethod
    def of(cls, value: Tensor, draws: Tensor) -> Estimate:
        """The value, with the interval that holds 95 % of the draws."""
        tail = (1 - _CONFIDENCE) / 2
        lower, upper = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
        return cls(float(value), lower, upper)


def estimate_mean(values: Tensor) -> Estimate:
    """The mean of `[N]` values.

    Example:
        >>> estimate_mean(torch.ones(5)).upper
        1.0
    """
    return Estimate.of(values.double().mean(), draw_means(values))


def estimate_ratio(after: Tensor, before: Tensor) -> Estimate:
    """The ratio of two means, `[N]` and `[M]` values of two draws of samples.

    Example:
        >>> estimate_ratio(torch.full((4,), 3.0), torch.ones(5)).lower
        3.0
    """
    draws = draw_means(after) / draw_means(before, seed=1)
    return Estimate.of(after.double().mean() / before.double().mean(), draws)


def draw_means(values: Tensor, seed: int = 0) -> Tensor:
    """The means of 1,000 draws with replacement, each of as many values as there are."""
    values, generator = values.double(), torch.Generator().manual_seed(seed)
    rows = max(1, _PIECE // len(values))
    counts = [min(rows, _DRAWS - start) for start in range(0, _DRAWS, rows)]
    return torch.cat(
        [values[torch.randint(len(values), (n, len(values)), generator=generator)].mean(dim=1) for n in counts]
    )


def estimate_auc(forget: Tensor, held_out: Tensor) -> Estimate:
    """The share of pairs in which the held-out sample has the higher loss, ties by half; see `MembershipAUC`.

    Args:
        forget: `[N]`, the losses of forgotten samples.
        held_out: `[M]`, those of held-out samples.
    """
    auc = MembershipAUC()
    auc.update(forget.double(), is_member=True)
    auc.update(held_out.double(), is_member=False)
    return Estimate(float(auc.compute()), *map(float, auc.interval(_CONFIDENCE, _DRAWS)))


def looks_remembered(auc: Estimate) -> bool:
    """Whether forgotten samples have lower losses than held-out ones, beyond chance and beyond what matters.

    Example:
        >>> looks_remembered(Estimate(0.6, 0.55, 0.65)), looks_remembered(Estimate(0.6, 0.45, 0.75))
        (True, False)
    """
    return auc.lower > 0.5 + _NO_DIFFERENCE


def rank_among(losses: Tensor, others: Tensor) -> Tensor:
    """For each of `[N]` losses the share of the `[M]` others that are lower, ties by half.

    Example:
        >>> rank_among(torch.tensor([0.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
        [0.0, 0.375, 1.0]
    """
    others = others.sort().values
    below, not_above = torch.searchsorted(others, losses), torch.searchsorted(others, losses, right=True)
    return (below + not_above).double() / (2 * len(others))
