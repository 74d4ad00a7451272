"""Quotas: what each step is asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.rules import HAMUQ, HAMUU, AbsoluteQuota, FixedRadius, RelativeQuota, TargetQuota

# Three blocks: conflicting, without forget gradient, collinear.
GRAMIAN = torch.tensor(
    [[[4.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [2.0, 4.0]]], dtype=torch.float64
)
CAPACITY = 0.1 * (1 + 0 + 2)


def ask(quota: Any, given: float | None = None, kind: type[HAMUQ] = HAMUQ) -> Any:
    resolved = None if given is None else torch.tensor(given)
    return kind(quota, radius=FixedRadius(0.1)).coefficients(GRAMIAN, lr=0.1, quota=resolved)


def test_a_number_is_an_absolute_quota() -> None:
    assert torch.equal(ask(0.05).values, ask(AbsoluteQuota(0.05)).values)
    assert float(ask(AbsoluteQuota(0.05)).forget_improvement) == pytest.approx(0.05)


@pytest.mark.parametrize(("kind", "capacity"), [(HAMUQ, CAPACITY), (HAMUU, 0.1 * (2 + 1 + 1))])
def test_a_relative_quota_is_a_share_of_the_capacity(kind: type[HAMUQ], capacity: float) -> None:
    step = ask(RelativeQuota(0.4), kind=kind)
    assert float(step.total_quota) == pytest.approx(0.4 * capacity)


@pytest.mark.parametrize(
    ("given", "expected"), [(0.1, 0.1), (10.0, 0.9 * CAPACITY), (-0.2, -0.2), (-math.inf, -math.inf)]
)
def test_a_resolved_target_is_capped(given: float, expected: float) -> None:
    assert float(ask(TargetQuota(1.0), given).total_quota) == pytest.approx(expected)


def test_a_target_may_be_given_less_of_the_capacity() -> None:
    assert float(ask(TargetQuota(1.0, share=0.5), 10.0).total_quota) == pytest.approx(0.5 * CAPACITY)
    assert float(ask(TargetQuota(1.0, share=0.5), 0.1).total_quota) == pytest.approx(0.1)


def test_what_was_resolved_overrides_every_quota() -> None:
    for quota in (0.05, AbsoluteQuota(0.05), RelativeQuota(0.4)):
        assert float(ask(quota, 0.01).total_quota) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("level", "step", "expected"),
    [(1.0, 0, 2.0 / 50), (2.0, 25, 1.0 / 25), (2.9, 48, 0.1 / 4), (2.9, 80, 0.1 / 4), (4.0, 10, -1.0 / 40)],
)
def test_a_target_asks_for_what_is_left(level: float, step: int, expected: float) -> None:
    """Divided by the steps that are left, at least 4 of them; negative past the target."""
    quota = TargetQuota(3.0).resolve(torch.tensor(level), torch.tensor(3.0), step=step, steps=50)
    assert float(quota) == pytest.approx(expected, rel=1e-6)  # float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AbsoluteQuota(-1.0), "Expected `quota` to be .* but got -1.0"),
        (lambda: RelativeQuota(math.nan), "Expected `fraction` to be .* but got nan"),
        (lambda: RelativeQuota(1.5), "at most 1, but got 1.5"),
        (lambda: TargetQuota(math.nan), "Expected `target` to be a finite loss, but got nan"),
        (lambda: TargetQuota(1.0, steps=0), "Expected `steps` to be at least 1, but got 0"),
        (lambda: TargetQuota(1.0, share=0.0), "Expected `share` to be above 0 and at most 1, but got 0.0"),
        (lambda: TargetQuota(1.0, share=1.5), "Expected `share` to be above 0 and at most 1, but got 1.5"),
        (lambda: HAMUU(TargetQuota(1.0)), "Expected HAMUU's `quota`"),
        (lambda: ask(TargetQuota(1.0)), "a target needs the forget loss"),
    ],
)
def test_what_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        make()
