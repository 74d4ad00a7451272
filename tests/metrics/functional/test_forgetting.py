"""The forgetting score against loops over samples, thresholds and models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional import forgetting_score


def draw(models: int, samples: int, shift: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(models, samples, generator=generator, dtype=torch.float64)).round() / 2 + shift


def attack(ours: list[float], theirs: list[float], delta: float) -> float:
    """Each threshold between values, or at none of them, and both directions."""
    values = sorted({*ours, *theirs})
    edges = [values[0] - 1, *[(a + b) / 2 for a, b in zip(values, values[1:], strict=False)], values[-1] + 1]
    best = 0.0
    for edge in edges:
        for sign in (1, -1):
            fnr = sum(sign * (x - edge) < 0 for x in ours) / len(ours)
            fpr = sum(sign * (x - edge) > 0 for x in theirs) / len(theirs)
            if fnr == 0 and fpr == 0:
                return math.inf
            if fnr == 0 or fpr == 0:
                continue
            for one, other in ((fpr, fnr), (fnr, fpr)):
                if 1 - delta - one > 0:
                    best = max(best, math.log((1 - delta - one) / other))
    return best


@pytest.mark.parametrize("delta", [0.0, 0.05])
@pytest.mark.parametrize("shift", [0.0, 1.0, 9.0])
def test_against_loops(shift: float, delta: float) -> None:
    ours, theirs = draw(7, 25, shift, 1), draw(9, 25, 0.0, 2)
    found = forgetting_score(ours, theirs, delta=delta)
    expected = [attack(ours[:, i].tolist(), theirs[:, i].tolist(), delta) for i in range(25)]
    assert found.epsilon.tolist() == pytest.approx(expected, abs=1e-9)
    bins = [min(13, 1 + math.floor(e / 0.5)) if math.isfinite(e) else 13 for e in expected]
    assert found.score.value == pytest.approx(sum(2 / 2**n for n in bins) / 25, abs=1e-12)
    assert found.score.n == (7, 9, 25)


def test_what_cannot_be_scored_has_a_reason() -> None:
    for ours, theirs, reason in (
        (torch.zeros(2, 0), torch.zeros(2, 0), "no sample"),
        (torch.zeros(0, 3), torch.zeros(2, 3), "no unlearned model"),
        (torch.zeros(2, 3), torch.full((2, 3), math.nan), "retrained models are NaN"),
    ):
        found = forgetting_score(ours, theirs)
        assert math.isnan(found.score.value) and reason in (found.score.reason or "")
    with pytest.raises(HAMUValueError, match=r"shape \[M, 3\]"):
        forgetting_score(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(HAMUValueError, match="delta"):
        forgetting_score(torch.zeros(2, 3), torch.zeros(2, 3), delta=1.0)
