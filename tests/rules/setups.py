"""The rules that all contract tests run over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hamu_lightning.rules import (
    HAMUQ,
    HAMUU,
    Coefficients,
    FineTune,
    FixedRadius,
    LearningRateRadius,
    RelativeRadius,
    Rule,
)
from tests.rules.test_baselines import RULES as BASELINES

ALLOCATIONS = ("proportional", "uniform", "softmax", "optimal")
RADII = (LearningRateRadius(), FixedRadius(0.1), RelativeRadius(0.1))
HAMU_RULES = [
    kind(0.05, radius=radius, allocation=allocation)  # type: ignore[arg-type]
    for kind in (HAMUQ, HAMUU)
    for radius in RADII
    for allocation in ALLOCATIONS
]

every_rule = pytest.mark.parametrize("rule", [*HAMU_RULES, FineTune(), *BASELINES], ids=repr)
hamu_rules = pytest.mark.parametrize("rule", HAMU_RULES, ids=repr)
kinds = pytest.mark.parametrize("kind", [HAMUQ, HAMUU])


def ask(rule: Rule, gramian: Tensor, lr: float | Tensor = 0.1, quota: Tensor | None = None) -> Coefficients:
    n = gramian.shape[0]
    return rule.coefficients(gramian, lr=lr, weight_norms=torch.arange(1.0, n + 1), sizes=torch.ones(n), quota=quota)
