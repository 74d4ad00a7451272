"""Whole steps against solved ones: several blocks, allocations, radii, both rules (tests/data/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hamu_lightning.gramian import compute_gramian
from hamu_lightning.rules import HAMUQ, HAMUU, Branch, FixedRadius, LearningRateRadius

VECTORS = json.loads((Path(__file__).parent.parent / "data" / "hamu_vectors.json").read_text())
# The accuracies that the design asks for, in units of the radius.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["id"])
def test_vector(vector: dict[str, Any]) -> None:
    dtype = getattr(torch, vector["dtype"])
    retain = [torch.tensor(b["retain"], dtype=torch.float64).to(dtype) for b in vector["blocks"]]
    forget = [torch.tensor(b["forget"], dtype=torch.float64).to(dtype) for b in vector["blocks"]]
    radius = LearningRateRadius() if vector["radius"]["kind"] == "lr" else FixedRadius(vector["radius"]["value"])
    rule = {"HAMUQ": HAMUQ, "HAMUU": HAMUU}[vector["rule"]](
        vector["quota"], radius=radius, allocation=vector["allocation"]
    )
    step = rule.coefficients(compute_gramian(retain, forget), lr=vector["lr"])
    for index, block in enumerate(vector["blocks"]):
        update = step.values[index, 0] * retain[index].double() + step.values[index, 1] * forget[index].double()
        expected = torch.tensor(block["update"], dtype=torch.float64)
        assert (update - expected).norm() <= TOLERANCES[dtype] * max(step.radius[index], 1e-300), block["branch"]
        assert Branch(int(step.branch[index])).name.lower() == block["branch"]
    capacity = (step.radius * step.gramian.diagonal(dim1=1, dim2=2).max(1).values.sqrt()).sum()
    for name in ("forget_improvement", "retain_improvement", "feasible_improvement"):
        # Improvements inherit the step's accuracy, in units of what the radii allow.
        assert abs(getattr(step, name) - vector[name]) <= 10 * TOLERANCES[dtype] * max(capacity, 1e-300), name
