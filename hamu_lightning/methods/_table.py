"""Tables for people: means over seeds with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.special import stdtrit

PERCENT = 100.0


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Args:
        title: Its title.
        read: From the name of a line to its values, one for each seed.
        scale: What the values are multiplied by.
        digits: After the point, where there is room.
        width: In characters.
    """

    title: str
    read: Callable[[str], Sequence[float]]
    scale: float = PERCENT
    digits: int = 1
    width: int = 10

    def cell(self, name: str) -> str:
        """Return what stands in a line."""
        return f"{format_cell([self.scale * value for value in self.read(name)], self.digits):>{self.width}}"


def format_block(corner: str, labels: Mapping[str, str], columns: Sequence[Column]) -> list[str]:
    """Return the lines of a table.

    Args:
        corner: What stands above the labels, as wide as they are.
        labels: The first cell of each line by its name.
        columns: The columns.
    """
    titles = " ".join((corner, *(f"{column.title:>{column.width}.{column.width}}" for column in columns)))
    lines = [" ".join((label, *(column.cell(name) for column in columns))) for name, label in labels.items()]
    return [line.rstrip() for line in (titles, *lines)]


def confidence(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % confidence interval (Student's t); NaN for one value."""
    if len(values) < 2:
        return mean(values), math.nan
    quantile = float(stdtrit(len(values) - 1, 0.975))
    return mean(values), quantile * stdev(values) / math.sqrt(len(values))


def is_clearly_below(low: Sequence[float], high: Sequence[float]) -> bool:
    """Whether the 95 % interval of the difference of the means (Student's t, equal variances) is above 0.

    Never where there are too few values.
    """
    degrees = len(low) + len(high) - 2
    if not low or not high or degrees < 1:
        return False
    squares = sum((value - mean(part)) ** 2 for part in (low, high) for value in part)
    half = float(stdtrit(degrees, 0.975)) * math.sqrt(squares / degrees * (1 / len(low) + 1 / len(high)))
    return mean(high) - mean(low) > half


def format_cell(values: Sequence[float], digits: int) -> str:
    """Mean and half width in at most 10 characters, the width of a column, up to a mean of 1000."""
    if not all(map(math.isfinite, values)):
        return "-"
    middle, half = confidence(values)
    if abs(middle) >= 1000:
        return f"{middle:.1e}"
    digits = min(digits, 1) if abs(middle) >= 10 or half >= 10 else digits
    if half >= 100 or (half >= 10 and abs(middle) >= 100):
        digits = 0
    spread = f"{half:.{digits}f}" if half < 1000 else f"{half:.0e}"
    return f"{middle:.{digits}f}" + ("" if math.isnan(half) else f" ±{spread}")
