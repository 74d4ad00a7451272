"""One number with all that is needed to judge it, and the plain ways to its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hamu_lightning.checks import check_count, check_number
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional._inputs import as_vector

Range = tuple[float, float]
_ANY: Range = (-math.inf, math.inf)


@dataclass(frozen=True)
class Estimate:
    """A measured number, how far chance could move it, and what it would be at best; NaN always has a reason.

    Args:
        value: The number; NaN where it is not defined.
        interval: Limits of a confidence interval, of 95 % where nothing else is said; None where there is none.
        n: How many samples of each kind it rests on: `(200,)`, or `(40, 200)` for forgotten and held-out ones.
        ideal: What a model without the forgotten data would have; None where only that model's own number says it.
        reason: Why the value is NaN; None otherwise.
        bound: "at least" or "at most" where the truth lies beyond the value, as at the cap of a search.

    Raises:
        HAMUValueError: If the value is NaN without a reason, or has a reason without being NaN.

    Example:
        >>> print(Estimate(0.625, (0.5, 0.75), n=(40, 200), ideal=0.5))
        0.625 [0.5, 0.75] (n = 40 + 200, ideal 0.5)
        >>> print(Estimate(math.nan, reason="no held-out sample was seen"))
        nan: no held-out sample was seen
        >>> print(Estimate(200.0, n=(8,), bound="at least"))
        at least 200 (n = 8)
    """

    value: float
    interval: Range | None = None
    n: tuple[int, ...] = ()
    ideal: float | None = None
    reason: str | None = None
    bound: Literal["at least", "at most"] | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.value) != (self.reason is not None):
            raise HAMUValueError(
                f"Expected `reason` to say why a value is NaN, and to be None otherwise, but got {self.value} and "
                f"{'no reason' if self.reason is None else 'a reason'}."
            )

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if self.reason is not None:
            return f"nan: {self.reason}"
        limits = "" if self.interval is None else f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]"
        counts = [f"n = {' + '.join(map(str, self.n))}"] if self.n else []
        ideal = [] if self.ideal is None else [f"ideal {self.ideal:.4g}"]
        rest = ", ".join(counts + ideal)
        words = f"{self.bound} " if self.bound else ""
        return f"{words}{self.value:.4g}{limits}" + (f" ({rest})" if rest else "")

    @property
    def is_defined(self) -> bool:
        """Whether there is a number."""
        return self.reason is None


def undefined(reason: str, n: tuple[int, ...] = (), ideal: float | None = None) -> Estimate:
    """Return a NaN with its reason.

    Example:
        >>> float(undefined("no reference was given"))
        nan
    """
    return Estimate(math.nan, n=n, ideal=ideal, reason=reason)


def mean_estimate(
    values: Any,
    what: str = "values",
    *,
    ideal: float | None = None,
    limits: Range = _ANY,
    confidence: float = 0.95,
) -> Estimate:
    """Return the mean over samples with a normal interval, `mean +- z s / sqrt(n)`.

    It covers the choice of the samples, not the spread over trainings. With few samples it is too narrow.

    Args:
        values: `[N]`, one number per sample.
        what: What they are, for the reason.
        ideal: As in `Estimate`.
        limits: The smallest and largest possible mean; the interval ends there.
        confidence: Probability to be covered, between 0 and 1.

    Returns:
        NaN with a reason for no sample or NaN values; no interval for one sample or infinite values.

    Raises:
        HAMUValueError: If `values` is no vector of numbers, or `confidence` out of range.

    Example:
        >>> print(mean_estimate(torch.tensor([0.0, 1.0, 0.0, 1.0]), limits=(0, 1)))
        0.5 [0, 1] (n = 4)
    """
    values, z = as_vector("values", values), normal_quantile(confidence)
    n = values.numel()
    reason = why_not(values, what)
    if reason is not None:
        return undefined(reason, (n,), ideal)
    mean = float(values.mean())
    if math.isnan(mean):
        return undefined(f"infinite {what} of both signs have no mean", (n,), ideal)
    if n == 1 or not math.isfinite(mean):
        return Estimate(mean, n=(n,), ideal=ideal)
    half = z * float(values.std()) / math.sqrt(n)
    return Estimate(mean, (max(limits[0], mean - half), min(limits[1], mean + half)), (n,), ideal)


def rate_estimate(hits: int, n: int, *, ideal: float | None = None, confidence: float = 0.95) -> Estimate:
    """Return a share with Wilson's interval (Wilson 1927), which does not collapse at 0 and 1 as the normal one does.

        (p + z^2/2n +- z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n),    p = hits / n

    Args:
        hits: How many of the samples.
        n: How many samples.
        ideal: As in `Estimate`.
        confidence: Probability to be covered, between 0 and 1.

    Returns:
        A number in [0, 1]; NaN with a reason for no sample.

    Raises:
        HAMUValueError: If these are no counts, or `confidence` is out of range.

    Example:
        >>> print(rate_estimate(0, 40))
        0 [0, 0.08762] (n = 40)
    """
    n = check_count("n", n, least=0)
    hits = check_count("hits", hits, least=0, most=n, cure="It counts samples among `n`.")
    z = normal_quantile(confidence)
    if n == 0:
        return undefined("no sample was seen", (0,), ideal)
    return Estimate(hits / n, wilson(hits / n, n, z), (n,), ideal)


def wilson(p: float, n: int, z: float) -> Range:
    """Wilson's interval of a share `p` of `n`."""
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At p = 0 and p = 1 one limit is p itself; rounding must not move it.
    lower = 0.0 if p == 0 else (centre - half) / (1 + z * z / n)
    return lower, 1.0 if p == 1 else (centre + half) / (1 + z * z / n)


def normal_quantile(confidence: float) -> float:
    """The `z` with `P(|Z| < z) = confidence` of a standard normal Z."""
    confidence = check_number("confidence", confidence, above=0, below=1, cure="The usual choice is 0.95.")
    return float(torch.special.ndtri(torch.tensor((1 + confidence) / 2, dtype=torch.float64)))


def why_not(values: Tensor, what: str) -> str | None:
    """Why no number can be made of one value per sample; None where one can."""
    n = values.numel()
    if n == 0:
        return "no sample was seen"
    n_nan = int(values.isnan().sum())
    return f"{n_nan} of {n} {what} are NaN" if n_nan else None
