"""One block at a time against bisection in 50 digits, for both rules and two radii (docs/method.md#closed-form).

The pairs of gradients are plane vectors whose inner products are known exactly; the rule sees these rounded to float64.
Blocks of one call share a quota by capacity, so that each gets the same share of its own: `share` below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TypeAlias

import numpy as np
import pytest
import torch

from hamu_lightning.rules import HAMUQ, HAMUU, Branch, Coefficients, FixedRadius, LearningRateRadius
from tests.oracles import Number, distance, in_fifty_digits, inner, solve_hamu_q, solve_hamu_u

Vector: TypeAlias = Sequence[Number]
Pair: TypeAlias = tuple[Vector, Vector]  # what is minimised and what the quota is about: retain, forget for HAMU-Q

CALLS, BLOCKS = 50, 20  # 1,000 blocks per case
ORACLES = {HAMUQ: solve_hamu_q, HAMUU: solve_hamu_u}
# |d - d*| in units of the radius: the accuracy that is promised. With sin >= 1e-2 rounding accounts for 1e-11.
TOLERANCE = 1e-6
LARGEST_COSINE = math.sqrt(1 - 1e-4)  # sin = 1e-2

rules = pytest.mark.parametrize("rule", [HAMUQ, HAMUU])
radii = pytest.mark.parametrize("radius", ["fixed", "learning_rate"])


def plane_pair(rng: np.random.Generator, cosine: float) -> Pair:
    """Two vectors of norm 1e-10 to 1e10 at about the given angle."""
    angle = rng.uniform(0, 2 * math.pi)
    other = angle + rng.choice([-1, 1]) * math.acos(cosine)
    sizes = 10 ** rng.uniform(-10, 10, 2)
    return (
        [float(sizes[0] * math.cos(angle)), float(sizes[0] * math.sin(angle))],
        [float(sizes[1] * math.cos(other)), float(sizes[1] * math.sin(other))],
    )


@in_fifty_digits
def collinear_pair(rng: np.random.Generator, sign: int) -> Pair:
    """`f = k r` to the last of 50 digits."""
    first = [float(x) for x in rng.normal(size=2) * 10 ** rng.uniform(-10, 10)]
    factor = sign * Decimal(10) ** Decimal(float(rng.uniform(-10, 10)))
    return first, [factor * Decimal(x) for x in first]


def nothing(pair: Pair, which: int) -> Pair:
    zero: Vector = [0.0, 0.0]
    return (zero, pair[1]) if which == 0 else (pair[0], zero)


def below(high: float, low: float = -LARGEST_COSINE) -> Callable[[np.random.Generator], float]:
    return lambda rng: float(rng.uniform(low, high))


@dataclass(frozen=True)
class Drawn:
    """The blocks of one call and the share of the capacity that is asked of them."""

    pairs: list[Pair]
    share: float


def ask(
    drawn: Drawn,
    rule: type[HAMUQ] | type[HAMUU],
    radius: str,
    rng: np.random.Generator,
    *,
    on_infeasible: str = "best_effort",
    quota: float | None = None,
) -> tuple[list[Pair], Coefficients]:
    """The gradients in the order retain, forget, and the rule's answer. Checks the radii on the way."""
    pairs = drawn.pairs if rule is HAMUQ else [exchange(pair) for pair in drawn.pairs]
    products = [(inner(r, r), inner(r, f), inner(f, f)) for r, f in pairs]
    gramian = torch.tensor(
        [[[float(rr), float(rf)], [float(rf), float(ff)]] for rr, rf, ff in products], dtype=torch.float64
    )
    lr = torch.from_numpy(10 ** rng.uniform(-4, 0, len(pairs)))
    fixed = float(10 ** rng.uniform(-4, 2))
    norms = [(float(rr.sqrt()), float(ff.sqrt()))[:: 1 if rule is HAMUQ else -1] for rr, _, ff in products]
    lengths = [fixed if radius == "fixed" else float(rate) * n[0] for rate, n in zip(lr, norms, strict=True)]
    capacity = math.fsum(length * n[1] for length, n in zip(lengths, norms, strict=True))
    total = drawn.share * capacity if quota is None else quota
    override = torch.tensor(total, dtype=torch.float64) if total < 0 else None
    settings = rule(
        max(total, 0.0),
        radius=FixedRadius(fixed) if radius == "fixed" else LearningRateRadius(),
        on_infeasible=on_infeasible,  # type: ignore[arg-type]
    )
    result = settings.coefficients(gramian, lr=lr, quota=override)
    # lr, a norm, their product: three roundings, and one more in the square root.
    np.testing.assert_allclose(result.radius.numpy(), lengths, rtol=1e-15)
    return pairs, result


def exchange(pair: Pair) -> Pair:
    """The gradients for which HAMU-U is the HAMU-Q problem of `pair`."""
    return [-x for x in pair[1]], [-x for x in pair[0]]


def check(
    pairs: list[Pair],
    result: Coefficients,
    rule: type[HAMUQ] | type[HAMUU],
    *,
    branch: Branch | None = None,
    on_infeasible: str = "best_effort",
    tolerance: Callable[[Pair], float] = lambda _: TOLERANCE,
) -> None:
    """Each block against the oracle, at the quota and radius that the rule reports for it."""
    rows = zip(
        pairs,
        result.values.tolist(),
        result.quota.tolist(),
        result.radius.tolist(),
        result.branch.tolist(),
        strict=True,
    )
    for (r, f), values, quota, radius, code in rows:
        expected = ORACLES[rule](inner(r, r), inner(f, f), inner(r, f), quota, radius, on_infeasible)
        assert Branch(code).name.lower() == expected.branch, (r, f, quota, radius)
        assert branch is None or code == branch, (r, f, quota, radius)
        error = distance(r, f, values, (expected.c_r, expected.c_f))
        assert error <= Decimal(tolerance((r, f)) * radius), (r, f, quota, radius, values, expected)


def run(
    rule: type[HAMUQ] | type[HAMUU],
    radius: str,
    draw: Callable[[np.random.Generator], Drawn],
    branch: Branch | None = None,
    on_infeasible: str = "best_effort",
    tolerance: Callable[[Pair], float] = lambda _: TOLERANCE,
) -> None:
    rng = np.random.default_rng(0)
    for _ in range(CALLS):
        pairs, result = ask(draw(rng), rule, radius, rng, on_infeasible=on_infeasible)
        check(pairs, result, rule, branch=branch, on_infeasible=on_infeasible, tolerance=tolerance)


def draw_pairs(rng: np.random.Generator, share: float, cosine: Callable[[np.random.Generator], float]) -> Drawn:
    return Drawn([plane_pair(rng, cosine(rng)) for _ in range(BLOCKS)], share)


@rules
@radii
def test_direct(rule: type[HAMUQ] | type[HAMUU], radius: str) -> None:
    """Plain descent already forgets enough: the cosine is at most minus the share."""

    def draw(rng: np.random.Generator) -> Drawn:
        share = float(rng.uniform(0, 0.99))
        return draw_pairs(rng, share, below(-share - 1e-9))

    run(rule, radius, draw, Branch.DIRECT)


@rules
@radii
def test_rectified_in_conflict(rule: type[HAMUQ] | type[HAMUU], radius: str) -> None:
    """rf > 0: what serves one objective hurts the other."""

    def draw(rng: np.random.Generator) -> Drawn:
        return draw_pairs(rng, float(rng.uniform(0, 1)), below(LARGEST_COSINE, low=0.0))

    run(rule, radius, draw, Branch.RECTIFIED)


@rules
@radii
def test_rectified_in_harmony(rule: type[HAMUQ] | type[HAMUU], radius: str) -> None:
    """rf < 0: both objectives improve, but plain descent forgets too little."""

    def draw(rng: np.random.Generator) -> Drawn:
        share = float(rng.uniform(1e-3, 1))
        return draw_pairs(rng, share, below(0.0, low=max(-share + 1e-9, -LARGEST_COSINE)))

    run(rule, radius, draw, Branch.RECTIFIED)


@rules
@radii
def test_nearly_parallel(rule: type[HAMUQ] | type[HAMUU], radius: str) -> None:
    """Down to sin = 1e-3, where the last digits of the Gramian decide."""

    def draw(rng: np.random.Generator) -> Drawn:
        sign = rng.choice([-1, 1])
        return draw_pairs(rng, float(rng.uniform(0, 0.95)), lambda g: sign * math.cos(10 ** g.uniform(-3, -2)))

    def tolerance(pair: Pair) -> float:
        # |p|^2 / rr = 1 - rf^2 / (rr ff) = sin^2 inherits the half ulps of four factors, and of its own few operations:
        # 4 eps in all, so 2 eps / sin^2 in |p|. The step holds s p / |p| with s <= R. At a share of 0.95, s reacts to q
        # with a factor of at most 3; twice that for safety.
        r, f = pair
        squared_sine = 1 - inner(r, f) ** 2 / (inner(r, r) * inner(f, f))
        return 12 * float(np.finfo(np.float64).eps) / float(squared_sine)

    run(rule, radius, draw, tolerance=tolerance)


@rules
@radii
@pytest.mark.parametrize("on_infeasible", ["best_effort", "skip"])
def test_infeasible(rule: type[HAMUQ] | type[HAMUU], radius: str, on_infeasible: str) -> None:
    """Best effort is all that the radius allows and never more; `skip` leaves the block where it is."""

    def draw(rng: np.random.Generator) -> Drawn:
        return draw_pairs(rng, float(1 + 10 ** rng.uniform(-8, 3)), below(LARGEST_COSINE))

    run(rule, radius, draw, Branch.INFEASIBLE, on_infeasible)


@rules
@radii
@pytest.mark.parametrize("sign", [-1, 1])
def test_collinear(rule: type[HAMUQ] | type[HAMUU], radius: str, sign: int) -> None:
    """Parallel: just the quota. Antiparallel: plain descent serves both."""

    def draw(rng: np.random.Generator) -> Drawn:
        return Drawn([collinear_pair(rng, sign) for _ in range(BLOCKS)], float(rng.uniform(1e-6, 1)))

    run(rule, radius, draw, Branch.COLLINEAR if sign > 0 else Branch.DIRECT)


@rules
@pytest.mark.parametrize("share", [0.0, 0.5, 1.5])
def test_no_retain_signal(rule: type[HAMUQ] | type[HAMUU], share: float) -> None:
    """Nothing to gain: the shortest step that meets the quota. (Under the learning-rate radius: no radius.)"""

    def draw(rng: np.random.Generator) -> Drawn:
        return Drawn([nothing(plane_pair(rng, 0.5), 0) for _ in range(BLOCKS)], share)

    run(rule, "fixed", draw, Branch.INFEASIBLE if share > 1 else Branch.NO_RETAIN_SIGNAL)


@rules
@radii
def test_no_forget_signal_anywhere(rule: type[HAMUQ] | type[HAMUU], radius: str) -> None:
    """A quota that no block can serve: no step, and the result says so."""
    rng = np.random.default_rng(0)
    for _ in range(CALLS):
        drawn = Drawn([nothing(plane_pair(rng, 0.5), 1) for _ in range(BLOCKS)], 0.0)
        _, result = ask(drawn, rule, radius, rng, quota=float(10 ** rng.uniform(-10, 10)))
        assert (result.branch == Branch.NO_FORGET_SIGNAL).all()
        assert (result.values == 0).all()
        assert not result.block_feasible.any()
        assert result.feasible_improvement == 0
        assert result.margin < 0


@rules
@radii
def test_no_forget_signal_and_nothing_asked(rule: type[HAMUQ] | type[HAMUU], radius: str) -> None:
    run(rule, radius, lambda rng: Drawn([nothing(plane_pair(rng, 0.5), 1) for _ in range(BLOCKS)], 0.0), Branch.DIRECT)


@rules
def test_no_radius(rule: type[HAMUQ] | type[HAMUU]) -> None:
    """The learning-rate radius of a block whose own gradient is zero."""
    rng = np.random.default_rng(0)
    for _ in range(CALLS):
        drawn = Drawn([nothing(plane_pair(rng, 0.5), 0) for _ in range(BLOCKS)], 0.0)
        pairs, result = ask(drawn, rule, "learning_rate", rng, quota=float(10 ** rng.uniform(-10, 10)))
        assert (result.branch == Branch.NO_RADIUS).all()
        assert (result.values == 0).all()


@rules
@radii
def test_negative_quota(rule: type[HAMUQ] | type[HAMUU], radius: str) -> None:
    """The loss in the constraint may fall by so much: used once a target is passed."""

    def draw(rng: np.random.Generator) -> Drawn:
        return draw_pairs(rng, float(rng.uniform(-1.2, -1e-3)), below(LARGEST_COSINE))

    run(rule, radius, draw)


@rules
@radii
def test_negative_quota_of_degenerate_blocks(rule: type[HAMUQ] | type[HAMUU], radius: str) -> None:
    def draw(rng: np.random.Generator) -> Drawn:
        pairs = [collinear_pair(rng, 1) for _ in range(8)] + [collinear_pair(rng, -1) for _ in range(4)]
        pairs += [nothing(plane_pair(rng, 0.5), 1) for _ in range(4)]
        if radius == "fixed":
            pairs += [nothing(plane_pair(rng, 0.5), 0) for _ in range(4)]
        return Drawn(pairs, float(rng.uniform(-0.9, -1e-3)))

    run(rule, radius, draw)


@rules
@radii
def test_quota_of_minus_infinity_is_plain_descent(rule: type[HAMUQ] | type[HAMUU], radius: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(CALLS):
        pairs = [plane_pair(rng, rng.uniform(-1, 1)) for _ in range(BLOCKS - 4)]
        pairs += [nothing(plane_pair(rng, 0.5), 1), collinear_pair(rng, 1), collinear_pair(rng, -1)]
        pairs += [nothing(nothing(plane_pair(rng, 0.5), 0), 1)]
        given, result = ask(Drawn(pairs, 0.0), rule, radius, rng, quota=-math.inf)
        for (r, f), values, length in zip(given, result.values.tolist(), result.radius.tolist(), strict=True):
            own, sign = (inner(r, r), -1) if rule is HAMUQ else (inner(f, f), 1)
            plain = sign * length / float(own.sqrt()) if own else 0.0
            # A root, a quotient, and the Gramian's own rounding.
            assert values == pytest.approx((plain, 0.0) if rule is HAMUQ else (0.0, plain), rel=1e-14, abs=0)


@rules
@radii
def test_zero_and_collinear_blocks_among_others(rule: type[HAMUQ] | type[HAMUU], radius: str) -> None:
    """The odd blocks neither disturb the others nor are disturbed by them."""

    def draw(rng: np.random.Generator) -> Drawn:
        odd = [nothing(nothing(plane_pair(rng, 0.5), 0), 1), collinear_pair(rng, 1), collinear_pair(rng, -1)]
        plain = [plane_pair(rng, rng.uniform(-LARGEST_COSINE, LARGEST_COSINE)) for _ in range(5)]
        return Drawn([plain[0], *odd, *plain[1:], nothing(plane_pair(rng, 0.5), 1)], float(rng.uniform(1e-3, 0.99)))

    rng = np.random.default_rng(0)
    for _ in range(CALLS):
        pairs, result = ask(draw(rng), rule, radius, rng)
        assert (result.values[1] == 0).all()
        assert result.quota[1] == result.quota[-1] == 0
        assert result.branch[2] == Branch.COLLINEAR
        assert result.branch[-1] == Branch.DIRECT
        # The block of zeros has no definite name under a fixed radius: nothing to gain, and nothing asked.
        check(pairs[:1] + pairs[2:], without(result, 1), rule)


def without(result: Coefficients, block: int) -> Coefficients:
    keep = [b for b in range(result.branch.numel()) if b != block]
    names = ("values", "branch", "quota", "radius", "block_feasible", "gramian")
    return replace(result, **{name: getattr(result, name)[keep] for name in names})
