"""What a rule promises, measured on actual gradients of 1 to 2,000 elements, with Gramians of our own.

The accuracies are those of docs/method.md#numerics.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hamu_lightning.gramian import assign_blocks, compute_gramian
from hamu_lightning.rules import HAMUQ, HAMUU, Branch, Coefficients, FixedRadius, LearningRateRadius

DIMENSIONS = (1, 2, 10, 200, 2000)
RADIUS = 0.37

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
rules = pytest.mark.parametrize("kind", [HAMUQ, HAMUU])


def gradients_at(
    sines: Tensor, dimension: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Pairs of vectors with norms from 1e-3 to 1e3 and the given sines of their angles, half of them obtuse."""
    n = sines.numel()
    a, b = torch.randn(2, n, dimension, generator=generator, dtype=torch.float64)
    if dimension > 1:
        b -= (a * b).sum(1, keepdim=True) / a.square().sum(1, keepdim=True) * a
        b /= b.norm(dim=1, keepdim=True)
    a /= a.norm(dim=1, keepdim=True)
    sine = sines.unsqueeze(1) if dimension > 1 else torch.zeros(n, 1, dtype=torch.float64)
    sign = 1.0 - 2 * torch.randint(0, 2, (n, 1), generator=generator)
    sizes = 10 ** torch.empty(2, n, 1, dtype=torch.float64).uniform_(-3, 3, generator=generator)
    forget = sizes[1] * (sign * (1 - sine.square()).sqrt() * a + sine * b)
    return list((sizes[0] * a).to(dtype)), list(forget.to(dtype))


def apply(result: Coefficients, retain: list[Tensor], forget: list[Tensor]) -> list[Tensor]:
    """The steps in the dtype of the gradients, as an optimizer forms them, widened to measure them."""
    rows = zip(result.values.tolist(), retain, forget, strict=True)
    return [(c_r * r + c_f * f).double() for (c_r, c_f), r, f in rows]


def check_promises(
    kind: type[HAMUQ] | type[HAMUU],
    retain: list[Tensor],
    forget: list[Tensor],
    share: float,
    sines: Tensor,
    allocation: str = "proportional",
) -> None:
    gramian = compute_gramian(retain, forget)
    constrained = forget if kind is HAMUQ else [-r for r in retain]
    norms = torch.stack([g.double().norm() for g in constrained])
    quota = share * RADIUS * float(norms.sum())
    rule = kind(quota, radius=FixedRadius(RADIUS), allocation=allocation)  # type: ignore[arg-type]
    result = rule.coefficients(gramian, lr=0.1)
    steps = apply(result, retain, forget)
    served = torch.stack([g.double() @ d for g, d in zip(constrained, steps, strict=True)])
    lengths = torch.stack([d.norm() for d in steps])
    missing = (result.quota - served) / (RADIUS * norms)
    if retain[0].dtype == torch.float64:
        assert missing.max() <= 1e-10
        assert lengths.max() <= RADIUS * (1 + 1e-9)
    else:
        assert (missing <= 1e-6 / sines).all()
        assert (lengths <= RADIUS * (1 + 1e-6 / sines.square())).all()


@dtypes
@rules
@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("share", [1e-3, 0.5, 0.999])
def test_quota_and_radius(kind: type[HAMUQ] | type[HAMUU], dtype: torch.dtype, dimension: int, share: float) -> None:
    """To the accuracies of docs/method.md#numerics, with angles down to those that rounding itself makes in float64."""
    generator = torch.Generator().manual_seed(dimension)
    smallest = -3 if dtype == torch.float32 else -9
    sines = 10 ** torch.empty(100, dtype=torch.float64).uniform_(smallest, 0, generator=generator)
    retain, forget = gradients_at(sines, dimension, dtype, generator)
    if dimension == 1:
        sines = torch.ones_like(sines)  # exactly collinear: nothing is divided by a sine
    check_promises(kind, retain, forget, share, sines)


@dtypes
@pytest.mark.parametrize("allocation", ["uniform", "softmax", "optimal"])
def test_total_quota_and_radius_by_other_allocations(dtype: torch.dtype, allocation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sines = 10 ** torch.empty(30, dtype=torch.float64).uniform_(-2, 0, generator=generator)
    pairs = [gradients_at(s.unsqueeze(0), d, dtype, generator) for s, d in zip(sines, 6 * DIMENSIONS, strict=True)]
    retain, forget = [r for (r,), _ in pairs], [f for _, (f,) in pairs]
    norms = torch.stack([f.double().norm() for f in forget])
    for share in (1e-3, 0.5, 0.99):
        quota = share * RADIUS * float(norms.sum())
        rule = HAMUQ(quota, radius=FixedRadius(RADIUS), allocation=allocation)  # type: ignore[arg-type]
        steps = apply(rule.coefficients(compute_gramian(retain, forget), lr=0.1), retain, forget)
        served = sum(float(f.double() @ d) for f, d in zip(forget, steps, strict=True))
        # docs/method.md#numerics with sin = 1e-2, summed over the blocks.
        missing = 1e-10 if dtype == torch.float64 else 1e-6 / 1e-2
        excess = 1e-9 if dtype == torch.float64 else 1e-6 / 1e-4
        assert served >= quota - missing * RADIUS * float(norms.sum())
        assert max(d.norm() for d in steps) <= RADIUS * (1 + excess)


@rules
@pytest.mark.parametrize("dimension", [1, 2, 1000])
@pytest.mark.parametrize("case", ["equal", "multiple", "opposite"])
@pytest.mark.parametrize("sums", ["ours", "float32"])
def test_collinear_float32_gradients(kind: type[HAMUQ] | type[HAMUU], dimension: int, case: str, sums: str) -> None:
    """The quota is met exactly by `(Q/ff) g_f`; rounding never becomes a step at full radius."""
    generator = torch.Generator().manual_seed(dimension)
    retain = torch.randn(100, dimension, generator=generator)
    factor = 10 ** torch.empty(100, 1).uniform_(-3, 3, generator=generator)
    forget = {"equal": retain.clone(), "multiple": factor * retain, "opposite": -factor * retain}[case]
    if sums == "ours":
        gramian = compute_gramian(list(retain), list(forget))
    else:  # somebody else's Gramian, summed in float32
        rows = torch.stack((retain, forget), 1)
        gramian = rows @ rows.mT
    constrained = forget if kind is HAMUQ else -retain
    norms = constrained.double().norm(dim=1)
    quota = 0.4 * RADIUS * float(norms.sum())
    result = kind(quota, radius=FixedRadius(RADIUS)).coefficients(gramian, lr=0.1)
    assert (result.branch == (Branch.DIRECT if case == "opposite" else Branch.COLLINEAR)).all()
    steps = torch.stack(apply(result, list(retain), list(forget)))
    along = constrained.double() / norms.unsqueeze(1)
    length = RADIUS * torch.ones_like(norms) if case == "opposite" else result.quota / norms
    # f = k r and the step are rounded to float32 (6e-8 each); sums in float32 add a few eps of 1.2e-7.
    tolerance = 3e-7 if sums == "ours" else 3e-6
    assert ((steps - length.unsqueeze(1) * along).norm(dim=1) <= tolerance * RADIUS).all()


@pytest.mark.parametrize("kappa", [-1.0, 1.0])
def test_one_element_tensors(kappa: float) -> None:
    """These ended at -0.73 Q elsewhere. Signs in conflict, in harmony, and a zero."""
    retain = [torch.tensor([x]) for x in (1.0, -3.0, 0.1, 0.0, 2.0)]
    forget = [torch.tensor([kappa * x]) for x in (0.7, -0.3, 5.0, 1.0, 0.0)]
    for kind in (HAMUQ, HAMUU):
        result = kind(0.2, radius=FixedRadius(RADIUS)).coefficients(compute_gramian(retain, forget), lr=0.1)
        steps = apply(result, retain, forget)
        constrained = forget if kind is HAMUQ else [-r for r in retain]
        served = [float(g.double() @ d) for g, d in zip(constrained, steps, strict=True)]
        assert all(s >= q * (1 - 1e-6) for s, q in zip(served, result.quota.tolist(), strict=True))  # float32 steps
        assert max(d.norm() for d in steps) <= RADIUS * (1 + 1e-6)


@dtypes
def test_a_block_of_several_tensors_is_one_problem(dtype: torch.dtype) -> None:
    """One radius and one quota for all tensors of a block, up to the whole model."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (1,), (50,), (2, 2, 2), (7,))
    for blocks in ("global", "layer"):
        ids, labels = assign_blocks(["a.weight", "a.bias", "b.weight", "c.weight", "c.bias"], [0] * 5, blocks)
        for _ in range(40):
            retain = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
            forget = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
            gramian = compute_gramian(retain, forget, blocks=ids)
            result = HAMUQ(0.5, radius=FixedRadius(RADIUS)).coefficients(gramian, lr=0.1)
            of_tensors = [result.values[b].tolist() for b in ids]
            steps = [(c[0] * r + c[1] * f).double() for c, r, f in zip(of_tensors, retain, forget, strict=True)]
            for block in range(len(labels)):
                mine = [t for t, b in enumerate(ids) if b == block]
                step = torch.cat([steps[t].flatten() for t in mine])
                along = torch.cat([forget[t].double().flatten() for t in mine])
                # Sines are near one here: rounding of the step in its own dtype.
                slack = 1e-10 if dtype == torch.float64 else 1e-6
                assert step @ along >= result.quota[block] - slack * RADIUS * along.norm()
                assert step.norm() <= RADIUS * (1 + (1e-9 if dtype == torch.float64 else 1e-6))
            assert result.quota.sum() == pytest.approx(0.5)


@rules
@pytest.mark.parametrize("allocation", ["proportional", "uniform", "optimal"])
@pytest.mark.parametrize("scale", [1e-10, 1e-3, 1e5, 1e10])
def test_unit_of_the_loss_does_not_matter(kind: type[HAMUQ] | type[HAMUU], allocation: str, scale: float) -> None:
    """Gradients and quota in another unit give the same step, for tiny and for huge losses."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 2, 5, 5, 100)
    retain = [torch.randn(n, generator=generator, dtype=torch.float64) for n in shapes]
    forget = [torch.randn(n, generator=generator, dtype=torch.float64) for n in shapes]
    forget[3] = 2 * retain[3]
    forget.append(torch.zeros(3, dtype=torch.float64))
    retain.append(torch.zeros(3, dtype=torch.float64))
    steps = []
    for unit in (1.0, scale):
        r, f = [unit * g for g in retain], [unit * g for g in forget]
        rule = kind(0.3 * unit, radius=FixedRadius(RADIUS), allocation=allocation)  # type: ignore[arg-type]
        steps.append(torch.cat(apply(rule.coefficients(compute_gramian(r, f), lr=0.1), r, f)))
    # 1e-6 is the accuracy of the optimal allocation, the others have a closed form.
    tolerance = 1e-6 if allocation == "optimal" else 1e-12
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=tolerance * RADIUS)


@rules
def test_one_objective_in_another_unit(kind: type[HAMUQ] | type[HAMUU]) -> None:
    """The free objective's unit is of no account, and the constrained one's only together with the quota."""
    generator = torch.Generator().manual_seed(0)
    pairs = [gradients_at(torch.tensor([0.5]).double(), d, torch.float64, generator) for d in (2, 5, 9)]
    retain, forget = [r for (r,), _ in pairs], [f for _, (f,) in pairs]
    steps = []
    for unit_r, unit_f in ((1.0, 1.0), (1e6, 1e-6), (1e-8, 1e8)):
        r, f = [unit_r * g for g in retain], [unit_f * g for g in forget]
        rule = kind(0.1 * (unit_f if kind is HAMUQ else unit_r), radius=FixedRadius(RADIUS))
        steps.append(torch.cat(apply(rule.coefficients(compute_gramian(r, f), lr=0.1), r, f)))
    for other in steps[1:]:
        torch.testing.assert_close(steps[0], other, rtol=0, atol=1e-12 * RADIUS)  # rounding


@rules
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_element_stops_the_whole_step(kind: type[HAMUQ] | type[HAMUU], bad: float) -> None:
    """Wherever it stands, no block moves at all, and every block says why."""
    generator = torch.Generator().manual_seed(0)
    for radius in (FixedRadius(RADIUS), LearningRateRadius()):
        for allocation in ("proportional", "uniform", "softmax", "optimal"):
            for where in range(6):
                retain = [torch.randn(4, generator=generator) for _ in range(3)]
                forget = [torch.randn(4, generator=generator) for _ in range(3)]
                (retain, forget)[where % 2][where // 2][where % 4] = bad
                rule = kind(0.1, radius=radius, allocation=allocation)
                result = rule.coefficients(compute_gramian(retain, forget), lr=0.1)
                assert (result.values == 0).all()
                assert (result.branch == Branch.NOT_FINITE).all()
                assert not result.block_feasible.any()
                assert result.forget_improvement == result.retain_improvement == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients(dtype: torch.dtype) -> None:
    """Norms whose squares underflow or overflow in the gradients' own dtype."""
    generator = torch.Generator().manual_seed(0)
    for size in (1e-5, 1e3):
        retain = [(size * torch.randn(500, generator=generator)).to(dtype) for _ in range(3)]
        forget = [(size * torch.randn(500, generator=generator)).to(dtype) for _ in range(3)]
        capacity = RADIUS * sum(float(f.double().norm()) for f in forget)
        rule = HAMUQ(0.5 * capacity, radius=FixedRadius(RADIUS))
        result = rule.coefficients(compute_gramian(retain, forget), lr=0.1)
        wide = [[g.double() for g in grads] for grads in (retain, forget)]
        steps = apply(result, *wide)
        served = sum(float(f @ d) for f, d in zip(wide[1], steps, strict=True))
        assert served == pytest.approx(0.5 * capacity, rel=1e-10)  # float64 sums of the numbers as they are
        assert max(d.norm() for d in steps) <= RADIUS * (1 + 1e-9)
