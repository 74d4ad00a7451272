"""Projections in place of gradients: unbiased, as exact as stated, and the step is the same one up to that."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.optim._sketch import Sketch
from hamu_lightning.rules import HAMUQ, FixedRadius
from tests.optim.test_groups import NAMES, RULE, fill, flat, gradient_of, loss_of, make_model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_inner_products_are_right_in_the_mean_and_as_far_off_as_stated() -> None:
    """Over 400 seeds, for an aligned pair of skewed gradients in two tensors, one of them longer than a piece."""
    a = draw(3000).pow(3)
    b = a + draw(3000, seed=1)
    grads = [[v[:1000], v[1000:]] for v in (a, b)]
    products = torch.stack(
        [
            Sketch(256, seed).project(grads[0], [0, 0])[0] @ Sketch(256, seed).project(grads[1], [0, 0])[0]
            for seed in range(400)
        ]
    )
    stated = (((a @ a) * (b @ b) + (a @ b) ** 2) / 256).sqrt()
    assert abs(products.mean() - a @ b) < 4 * stated / 400**0.5  # four standard errors
    # A heavy tail shares few buckets: the variance is below the bound, and of its order.
    assert 0.3 * stated < products.std() < 1.1 * stated


def test_blocks_are_apart_and_none_is_zero() -> None:
    sketch = Sketch(64)
    both = sketch.project([draw(50), None, draw(50, seed=1)], [0, 0, 1])
    torch.testing.assert_close(both[0], sketch.project([draw(50), None, None], [0, 0, 1])[0])
    assert both.shape == (2, 64) and both[1].any()


def test_sparse_and_half_gradients() -> None:
    dense = torch.zeros(30)
    dense[[3, 7]] = torch.tensor([1.0, -2.0])
    expected = Sketch(16).project([dense], [0])
    assert torch.equal(Sketch(16).project([dense.to_sparse()], [0]), expected)
    assert torch.equal(Sketch(16).project([dense.half()], [0]), expected)


def sketched(model: nn.Module, size: int, seed: int = 0, rule: Any = RULE) -> HAMUOptimizer:
    optimizer = HAMUOptimizer(SGD(model.parameters(), lr=0.1), rule, sketch=size)
    optimizer.recompute = lambda name: loss_of(model, name, seed).backward()
    return optimizer


def test_the_step_is_a_combination_that_keeps_its_promises_up_to_the_stated_error() -> None:
    model = make_model()
    grads = {name: gradient_of(model, name) for name in NAMES}
    before = flat(model)
    optimizer = sketched(model, 2**14)
    fill(optimizer, model)
    retain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    moved = flat(model) - before
    assert optimizer.last_step is not None
    values = optimizer.last_step.coefficients.values[0]
    torch.testing.assert_close(moved, sum(v * grads[n] for v, n in zip(values, NAMES, strict=True)))
    assert all(torch.equal(a, p.grad) for a, p in zip(retain, model.parameters(), strict=True))  # type: ignore[arg-type]
    for name, floor in (("a", 0.02), ("b", 0.01)):
        error = 5 * float(grads[name].norm() * moved.norm()) / 2**7  # five times the stated error
        assert float(grads[name] @ moved) >= floor - error
    assert float(grads["rare"] @ moved) <= 5 * float(grads["rare"].norm() * moved.norm()) / 2**7


def test_it_tends_to_the_exact_step() -> None:
    exact, models = make_model(), [make_model() for _ in range(2)]
    plain = HAMUOptimizer(SGD(exact.parameters(), lr=0.1), RULE)
    fill(plain, exact)
    start = flat(exact)
    plain.step()
    errors = []
    for model, size in zip(models, (2**6, 2**20), strict=True):
        optimizer = sketched(model, size)
        fill(optimizer, model)
        optimizer.step()
        errors.append(float((flat(model) - flat(exact)).norm() / (flat(exact) - start).norm()))
    assert errors[1] < 0.05 < errors[0]


def test_micro_batches_add_up() -> None:
    """A group that is entered twice holds the sum, and so does what is made again."""
    once, twice = make_model(), make_model()
    one, two = sketched(once, 2**12), sketched(twice, 2**12)
    fill(one, once)
    for name in NAMES:
        for _ in range(2):
            with two.group(name):
                (loss_of(twice, name) / 2).backward()
    two.recompute = lambda name: [(loss_of(twice, name) / 2).backward() for _ in range(2)]
    one.step()
    two.step()
    torch.testing.assert_close(flat(once), flat(twice))


def test_gradients_are_let_go() -> None:
    """After the pass of each group its gradient is gone; the retain gradient stays."""
    model, alive = make_model(), {}
    optimizer = sketched(model, 64)
    for name in NAMES:
        with optimizer.group(name):
            loss_of(model, name).backward()
            grad = next(model.parameters()).grad
            assert grad is not None
            alive[name] = weakref.ref(grad)
            del grad
    assert [name for name in NAMES if alive[name]() is not None] == ["retain"]


def test_what_cannot_be() -> None:
    model = make_model()
    with pytest.raises(HAMUValueError, match="`sketch` to be at least 1, but got 0. It is the number of buckets"):
        HAMUOptimizer(SGD(model.parameters(), lr=0.1), RULE, sketch=0)
    with pytest.raises(HAMUValueError, match="Expected `sketch` to go with a rule for blocks='global'"):
        HAMUOptimizer(SGD(model.parameters(), lr=0.1), HAMUQ(0.1, radius=FixedRadius(0.1)), sketch=64)
    with pytest.raises(HAMUValueError, match="Expected `sketch` to go with"):
        HAMUOptimizer(SGD(model.parameters(), lr=0.1), RULE, sketch=64, track_actual=True)
    with pytest.raises(HAMUValueError, match="Expected `sketch` to go with"):
        mask = {p: torch.ones_like(p, dtype=torch.bool) for p in model.parameters()}
        HAMUOptimizer(SGD(model.parameters(), lr=0.1), RULE, sketch=64, mask=mask)
    optimizer = HAMUOptimizer(SGD(model.parameters(), lr=0.1), RULE, sketch=64)
    fill(optimizer, model)
    before = flat(model)
    with pytest.raises(HAMUStateError, match="Expected `optimizer.recompute` with `sketch`"):
        optimizer.step()
    assert torch.equal(before, flat(model))
