"""Means over batch pairs, and of what is computed from them, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95
_RESAMPLES = 2_000


@dataclass(frozen=True)
class Estimate:
    """A mean over batch pairs.

    Args:
        mean: The mean (of a ratio: the ratio of the means).
        low: Where its 95 % bootstrap interval begins; NaN with fewer than two batch pairs.
        high: Where it ends.
        values: The value of each batch pair; empty for what is only known of the means.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...] = ()

    def __str__(self) -> str:
        interval = "-" if math.isnan(self.low) else f"{self.low:.4g} .. {self.high:.4g}"
        return f"{self.mean:>11.4g}   {interval}"


def bootstrap(
    samples: Tensor, statistic: Callable[[Tensor], Tensor] = lambda means: means[:, 0], seed: int = 0
) -> tuple[float, float, float]:
    """Estimate a function of means, and its percentile bootstrap interval.

    Args:
        samples: `[n, K]`, float64, independent rows.
        statistic: From means `[S, K]` to values `[S]`.
        seed: Of the resampling's own generator.

    Returns:
        The value at the sample means, and the ends of the 95 % interval (NaN for fewer than two rows).

    Example:
        >>> mean, low, high = bootstrap(torch.arange(16, dtype=torch.float64).unsqueeze(1))
        >>> mean, 4 < low < 6, 9 < high < 11
        (7.5, True, True)
    """
    n = len(samples)
    value = float(statistic(samples.mean(dim=0, keepdim=True)))
    if n < 2:
        return value, math.nan, math.nan
    drawn = torch.randint(n, (_RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
    counts = samples.new_zeros(_RESAMPLES, n).scatter_add_(1, drawn, samples.new_ones(_RESAMPLES, n))
    # Taken from the sorted values: an infinite one does not mix with its neighbour.
    resampled = statistic(counts @ samples / n).sort().values
    cut = int((1 - LEVEL) / 2 * _RESAMPLES)
    return value, float(resampled[cut]), float(resampled[-1 - cut])


def count_steps(means: Tensor, target: float) -> Tensor:
    """Steps from the forget loss to the target, `[S]`, from means of loss, improvement and cost `[S, 3]`."""
    loss, gain, _ = means.unbind(dim=1)
    needed = torch.where(gain > 0, (target - loss) / gain, torch.inf)
    return torch.where(loss >= target, 0, needed)


def sum_cost(means: Tensor, target: float) -> Tensor:
    """The retain cost of these steps, `[S]`; likewise."""
    cost = means[:, 2]
    return torch.where(cost == 0, 0, count_steps(means, target) * cost)
