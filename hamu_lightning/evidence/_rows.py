"""What attacks and the audit hand to the report: one row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hamu_lightning.metrics.functional import Estimate


@dataclass(frozen=True)
class AttackRow:
    """What one attack found, and what the same attack finds in a model that never saw the forgotten data.

    Attributes:
        name: Which attack, a short key: "probe", "logit_shift", "relearn", ...
        value: What it found in the unlearned model.
        control: What it finds in a retrained model, under the same settings; None where there is none.
        note: What the number means, and its unit, in plain words.

    Example:
        >>> row = AttackRow("probe", Estimate(0.99), Estimate(0.95), "accuracy of a linear probe on frozen features")
        >>> row.value.value > row.control.value
        True
    """

    name: str
    value: Estimate
    control: Estimate | None
    note: str


@dataclass(frozen=True)
class Finding:
    """One place where forgotten data may still sit.

    Attributes:
        place: Where: a file, a buffer, a cache.
        holds: Whether something of the forgotten data is there.
        advice: What to do.

    Example:
        >>> Finding("optimizer moments", "unknown", "Start the next fit with a fresh optimizer.").holds
        'unknown'
    """

    place: str
    holds: Literal["yes", "no", "unknown"]
    advice: str
