"""Whole steps against solved ones: several blocks, allocations and radii, both rules (see tests/data/README.md)."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hamu_lightning.gramian import compute_gramian
from hamu_lightning.rules import HAMUQ, HAMUU, Branch, FixedRadius, LearningRateRadius
from tests.oracles import (
    JointProblem,
    inner,
    share_proportionally,
    share_uniformly,
    solve_certificate,
    solve_hamu_q,
    solve_hamu_u,
)

VECTORS = json.loads((Path(__file__).parent.parent / "data" / "hamu_vectors.json").read_text())
# Of the radius: the accuracies that are promised, by the dtype of the gradients.
TOLERANCES = {"float32": 1e-5, "float64": 1e-10}
# Of the reach: a collinear block adds the root of a difference that cancels to 1e-16, so 1e-8 is what float64 can give.
CERTIFICATE_TOLERANCES = {"float32": 1e-5, "float64": 2e-8}
# Squared sine of vectors that are parallel up to the rounding of their own elements, 1e-16 in float64.
PARALLEL = 1e-28

vectors = pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["id"])


def gradients(vector: dict[str, Any], name: str) -> list[Tensor]:
    dtype = getattr(torch, vector["dtype"])
    return [torch.tensor(block[name], dtype=torch.float64).to(dtype) for block in vector["blocks"]]


def reaches(retain: list[Tensor], forget: list[Tensor], radius: Tensor) -> dict[str, float]:
    """The most that each objective can change, the unit in which an error of an improvement is small."""
    r, f = (torch.stack([g.double().norm() for g in grads]) @ radius for grads in (retain, forget))
    return {"retain_improvement": float(r), "forget_improvement": float(f)}


@vectors
def test_rule(vector: dict[str, Any]) -> None:
    retain, forget = gradients(vector, "retain"), gradients(vector, "forget")
    radius = LearningRateRadius() if vector["radius"]["kind"] == "lr" else FixedRadius(vector["radius"]["value"])
    kind = {"HAMUQ": HAMUQ, "HAMUU": HAMUU}[vector["rule"]]
    rule = kind(vector["quota"], radius=radius, allocation=vector["allocation"])
    result = rule.coefficients(compute_gramian(retain, forget), lr=vector["lr"])
    tolerance = TOLERANCES[vector["dtype"]]
    for b, block in enumerate(vector["blocks"]):
        update = result.values[b, 0] * retain[b].double() + result.values[b, 1] * forget[b].double()
        expected = torch.tensor(block["update"], dtype=torch.float64)
        assert (update - expected).norm() <= tolerance * result.radius[b], block["branch"]
        assert Branch(int(result.branch[b])).name.lower() == block["branch"]
    reach = reaches(retain, forget, result.radius)
    for name, unit in reach.items():
        # An update off by `tolerance R` moves an improvement by that share of its reach.
        assert float(getattr(result, name)) == pytest.approx(vector[name], abs=tolerance * unit, rel=0), name
    certificate = result.feasible_improvement.item()
    unit = reach["forget_improvement" if kind is HAMUQ else "retain_improvement"]
    near = pytest.approx(vector["feasible_improvement"], abs=CERTIFICATE_TOLERANCES[vector["dtype"]] * unit, rel=0)
    assert certificate == near
    assert result.margin.item() == pytest.approx(certificate - vector["quota"], abs=1e-15 * vector["quota"])


@vectors
def test_oracle(vector: dict[str, Any]) -> None:
    """The oracles of these tests alone give the same answers."""
    retain = [g.double().tolist() for g in gradients(vector, "retain")]
    forget = [g.double().tolist() for g in gradients(vector, "forget")]
    products = [(inner(r, r), inner(f, f), inner(r, f)) for r, f in zip(retain, forget, strict=True)]
    is_q = vector["rule"] == "HAMUQ"
    norms = [(float(rr.sqrt()), float(ff.sqrt())) for rr, ff, _ in products]
    free, constrained = zip(*(n if is_q else n[::-1] for n in norms), strict=True)
    radii = [vector["radius"]["value"] if vector["radius"]["kind"] == "fixed" else vector["lr"] * n for n in free]
    capacities = [radius * n for radius, n in zip(radii, constrained, strict=True)]
    share = {"proportional": share_proportionally, "uniform": share_uniformly}[vector["allocation"]]
    problem = JointProblem(tuple(map(np.array, retain)), tuple(map(np.array, forget)), np.array(radii))
    coefficients = []
    for b, quota in enumerate(share(capacities, vector["quota"])):
        step = (solve_hamu_q if is_q else solve_hamu_u)(*products[b], quota, radii[b], parallel=PARALLEL)
        block = vector["blocks"][b]
        assert step.branch == block["branch"]
        update = [step.c_r * Decimal(r) + step.c_f * Decimal(f) for r, f in zip(retain[b], forget[b], strict=True)]
        difference = [float(u) - expected for u, expected in zip(update, block["update"], strict=True)]
        assert np.linalg.norm(difference) <= 1e-10 * radii[b]  # the vectors were computed in float64
        coefficients.append((float(step.c_r), float(step.c_f)))
    gain, retained = problem.improvements(np.array(coefficients))
    assert gain == pytest.approx(vector["forget_improvement"], abs=1e-10 * problem.forget_reach, rel=0)
    assert retained == pytest.approx(vector["retain_improvement"], abs=1e-10 * problem.retain_reach, rel=0)
    asked = problem if is_q else problem.exchanged()
    expected = pytest.approx(vector["feasible_improvement"], abs=1e-8 * asked.forget_reach, rel=0)  # the cone solver's
    assert solve_certificate(asked) == expected
