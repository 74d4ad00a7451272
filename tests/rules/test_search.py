"""Interpolation in a bracket against the vectorised rounds that read nothing on the host."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hamu_lightning.rules import HAMUQ, Coefficients, FixedRadius, _search

BLOCKS = (1, 2, 65, 448, 3000)


def draw_gramian(blocks: int, collinear: int) -> Tensor:
    """Norms over four orders of magnitude; so many blocks on a line."""
    generator = torch.Generator().manual_seed(blocks)
    retain, forget = torch.randn(2, blocks, generator=generator, dtype=torch.float64).exp()
    cosine = torch.empty(blocks, dtype=torch.float64).uniform_(-0.5, 0.99, generator=generator)
    cosine[:collinear] = 1.0
    rows = retain.square(), retain * forget * cosine, retain * forget * cosine, forget.square()
    return torch.stack(rows, dim=1).view(blocks, 2, 2)


def solve_both(gramian: Tensor, share: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Coefficients, Coefficients]:
    reach = float(gramian[:, 1, 1].sqrt().sum())
    rule = HAMUQ(share * reach, radius=FixedRadius(1.0), allocation="optimal")
    found = rule.coefficients(gramian, lr=0.1)
    float(found.margin)  # it is computed when somebody asks
    monkeypatch.setattr(_search, "is_on_host", lambda tensor: False)
    slow = rule.coefficients(gramian, lr=0.1)
    float(slow.margin)
    return found, slow


def assert_same(found: Coefficients, slow: Coefficients) -> None:
    """To 1e-12 of what the radii allow: sums over the blocks cancel."""
    reach = slow.gramian.diagonal(dim1=1, dim2=2).sqrt().sum(dim=0)
    for name, most in zip(("retain_improvement", "forget_improvement"), reach.tolist(), strict=True):
        torch.testing.assert_close(getattr(found, name), getattr(slow, name), rtol=0, atol=1e-12 * most)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("share", [1e-6, 0.3, 0.9, 0.999])
def test_the_optimal_allocation(blocks: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found, slow = solve_both(draw_gramian(blocks, 0), share, monkeypatch)
    # The rounds end at 3e-15 of the interval.
    assert (found.values - slow.values).abs().max() <= 1e-12 * slow.values.abs().max()
    assert_same(found, slow)
    torch.testing.assert_close(found.feasible_improvement, slow.feasible_improvement, rtol=1e-12, atol=0)


@pytest.mark.parametrize("collinear", [1, 5, 65])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_where_the_sum_jumps(collinear: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks on a line change their direction at once: the step is a mixture, and the certificate has a kink."""
    found, slow = solve_both(draw_gramian(65, collinear), share, monkeypatch)
    assert_same(found, slow)
    # The rounds end at 4e-11 of the interval, on one side of the kink.
    torch.testing.assert_close(found.feasible_improvement, slow.feasible_improvement, rtol=1e-9, atol=0)


FUNCTIONS: dict[str, tuple[Callable[[float], float], float, int]] = {
    "line": (lambda t: t - 0.3, 0.3, 6),
    "smooth": (lambda t: math.atan(30 * (t - 0.7)), 0.7, 14),
    "steep": (lambda t: t**9 - 1e-3, 1e-3 ** (1 / 9), 20),
    "jump": (lambda t: 1.0 if t > 0.1 else -1.0, 0.1, 70),
    "flat": (lambda t: max(t - 0.6, 0.0) - 1e-9, 0.6 + 1e-9, 70),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_bracket_is_tight(name: str) -> None:
    function, root, most = FUNCTIONS[name]
    calls: list[float] = []
    left, right = _search.interpolate(lambda t: calls.append(t) or function(t))  # type: ignore[func-returns-value]
    assert left <= right <= left + 1e-14
    assert left == pytest.approx(root, abs=1e-14)
    assert len(calls) <= most


def test_the_ends() -> None:
    assert _search.interpolate(lambda t: t) == (0, 0)
    assert _search.interpolate(lambda t: t - 2) == (1, 1)
    assert _search.interpolate(lambda t: math.nan) == (1, 1)
