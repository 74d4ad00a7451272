"""Steps of float32 weights in host memory against the general way, which takes every sum in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ConstantLR

from hamu_lightning.gramian import compute_gramian
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.optim._host import HostPlan, can_move_directly
from hamu_lightning.rules import HAMUQ, FixedRadius, RelativeRadius, Rule

# Small ones, some of one size side by side, one that is cut into pieces, and one whose channels come last in memory.
SHAPES = ((), (0,), (3, 5), (2047,), (2048,), (40_000,), (41, 1000), (40_000,), (300_001,), (1, 8, 6, 64))
RULES: dict[str, Rule] = {
    "tensors": HAMUQ(1e-3, radius=FixedRadius(0.1)),
    "layers": HAMUQ(1e-3, radius=RelativeRadius(0.01), blocks="layer"),
    "optimal": HAMUQ(1e-3, radius=FixedRadius(0.1), allocation="optimal"),
}


def draw(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [scale * torch.randn(shape, generator=generator) for shape in SHAPES]
    return [g.contiguous(memory_format=torch.channels_last) if g.ndim == 4 else g for g in drawn]


def make(rule: Rule, is_general: bool) -> tuple[list[nn.Parameter], HAMUOptimizer]:
    weights = [nn.Parameter(w) for w in draw(0)]
    optimizer = HAMUOptimizer(SGD(weights, lr=0.1), rule, [(f"{i // 3}.{i}", w) for i, w in enumerate(weights)])
    if is_general:
        layout = optimizer._core.update_layout()
        optimizer._core.host_plan = layout, None
    return weights, optimizer


def step(weights: list[nn.Parameter], optimizer: HAMUOptimizer, retain: list[Tensor], forget: list[Tensor]) -> None:
    for name, grads in (("retain", retain), ("forget", forget)):
        with optimizer.group(name):
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad.clone()
    optimizer.step()


def plan_for(grads: list[Tensor]) -> HostPlan:
    weights = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    host = HAMUOptimizer(SGD(weights, lr=0.1), RULES["tensors"])._core.host_plan
    assert host is not None
    assert host[1] is not None
    return host[1]


@pytest.mark.parametrize("rule", RULES)
def test_steps_are_those_of_the_general_way(rule: str) -> None:
    found = []
    for is_general in (False, True):
        weights, optimizer = make(RULES[rule], is_general)
        for seed in (1, 2):
            step(weights, optimizer, draw(2 * seed), draw(2 * seed + 1))
        assert optimizer.last_step is not None
        found.append((weights, optimizer.last_step.gramian))
    (weights, gramian), (expected, exact) = found
    torch.testing.assert_close(gramian, exact, rtol=1e-7, atol=1e-7 * float(exact.max()))
    for weight, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-7)  # an ulp of the weight, and of the step


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
@pytest.mark.parametrize("turned", [0.0, 1e-4, 1e-1, 1.0])
def test_sums_are_as_exact_as_their_use(scale: float, turned: float) -> None:
    """Float32 would lose nearly parallel gradients, and those whose squares it does not hold."""
    retain = draw(1, scale)
    forget = [r + turned * f for r, f in zip(retain, draw(2, scale), strict=True)]
    gramian, _ = plan_for(retain).multiply(retain, forget)
    exact = compute_gramian(retain, forget)
    norms = exact.diagonal(dim1=1, dim2=2).sqrt()
    bound = norms.unsqueeze(2) * norms.unsqueeze(1)
    # What docs/method.md#numerics says, and where the angle is small the sums of float64.
    limit = 2e-7 if turned > 1e-2 else 1e-13
    assert ((gramian - exact).abs() <= limit * bound).all()


def test_a_gradient_with_itself() -> None:
    """The rule sees one direction: an angle from rounding would be well below that of docs/method.md, eq. 12.1."""
    grads = draw(1)
    gramian, _ = plan_for(grads).multiply(grads, grads)
    # To a few roundings of float64.
    torch.testing.assert_close(gramian, gramian[:, :1, :1].expand_as(gramian), rtol=1e-15, atol=0)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [3, 4, 8])
def test_what_is_not_finite_moves_nothing(number: float, place: int) -> None:
    weights, optimizer = make(RULES["tensors"], is_general=False)
    before, forget = [w.detach().clone() for w in weights], draw(2)
    retain = draw(1)
    forget[place][7], retain[place][7] = number, 0.0
    step(weights, optimizer, retain, forget)
    assert optimizer.not_finite_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


def test_gradients_stay_as_they_are() -> None:
    """Nothing is written over them: a trial, or a reused group, needs no copy."""
    weights, optimizer = make(RULES["tensors"], is_general=False)
    kept = []
    for name, grads in (("retain", draw(1)), ("forget", draw(2))):
        with optimizer.group(name):
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad
        kept += grads
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, [*draw(1), *draw(2)], strict=True))


def with_hook(base: Optimizer) -> None:
    base.register_step_post_hook(lambda *_: None)


def with_own_step(base: Optimizer) -> None:
    step = base.step
    base.step = lambda *args: step(*args)  # type: ignore[method-assign]


def with_scheduler(base: Optimizer) -> None:
    ConstantLR(base)


@pytest.mark.parametrize(
    ("change", "moves"), [(with_hook, False), (with_own_step, False), (with_scheduler, True), (lambda _: None, True)]
)
def test_the_base_steps_itself_where_it_does_more(change: Callable[[Optimizer], None], moves: bool) -> None:
    base = SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    change(base)
    assert can_move_directly(base) is moves
    assert not can_move_directly(SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9))


def test_a_patch_of_the_class_sees_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that looks like what it wraps."""
    own, seen = SGD.step, []

    @wraps(own)
    def patched(*args: Any) -> Any:
        seen.append(args[0])
        return own(*args)

    monkeypatch.setattr(SGD, "step", patched)
    weights, optimizer = make(RULES["tensors"], is_general=False)
    step(weights, optimizer, draw(1), draw(2))
    assert len(seen) == 1


def test_other_weights_and_gradients_go_the_general_way() -> None:
    for weight in (torch.ones(2, dtype=torch.float64), torch.ones(2, device="meta")):
        host = HAMUOptimizer(SGD([nn.Parameter(weight)], lr=0.1), HAMUQ(0.1))._core.host_plan
        assert host is not None
        assert host[1] is None
    plan = plan_for([torch.ones(2)])
    assert plan.takes([torch.ones(2)])
    assert not plan.takes([torch.ones(2), None])
    assert not plan.takes([torch.eye(2).to_sparse()])
