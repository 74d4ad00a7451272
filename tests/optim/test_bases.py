"""Bases with ways of their own: other methods, other gradients, closures; and copies of an optimizer in a fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from typing_extensions import override

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.rules import HAMUQ, FineTune, FixedRadius
from tests.optim.doors import BASES, RULE, Wrap, make_losses, make_model, take_step, weights, wrap_directly

pytestmark = pytest.mark.filterwarnings("ignore:The base optimizer", "ignore:The weights are bfloat16")


class Averages(SGD):
    """Has a mode, as optimizers without a schedule do."""

    mode = "eval"

    def train(self) -> None:
        self.mode = "train"


class TwoPass(SGD):
    """Evaluates the loss twice in a step."""

    @override
    def step(self, closure: Any = None) -> Any:
        if closure is None:
            raise AssertionError("a closure is needed")
        closure()
        return super().step(closure)


def test_methods_of_the_base_are_there(wrap: Wrap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASES, "averages", lambda p: Averages(p, lr=0.1))
    optimizer = wrap(make_model(), base="averages")
    optimizer.train()
    assert optimizer.base.mode == optimizer.mode == "train"
    with pytest.raises(AttributeError, match="no attribute 'swap'"):
        optimizer.swap()


@pytest.mark.parametrize("rule", [RULE, FineTune()])
@pytest.mark.parametrize("plan", ["combine", "retain_only"])
def test_a_base_that_needs_a_closure_is_named(rule: Any, plan: Any) -> None:
    model = make_model()
    optimizer, before = HAMUOptimizer(TwoPass(model.parameters(), lr=0.1), rule), weights(model)
    optimizer.plan_step(plan)
    with pytest.raises(HAMUStateError, match="Expected TwoPass to step on what `.grad` holds, without a closure"):
        take_step(optimizer, model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    take_step(HAMUOptimizer(TwoPass(model.parameters(), lr=0.1), RULE, exact=True), model)
    assert not torch.equal(before[0], model[0].weight)


def test_a_want_of_memory_stays_what_it_is() -> None:
    class Large(SGD):
        @override
        def step(self, closure: Any = None) -> Any:
            raise torch.OutOfMemoryError

    model = make_model()
    with pytest.raises(torch.OutOfMemoryError):
        take_step(HAMUOptimizer(Large(model.parameters(), lr=0.1), RULE), model)


def per_sample(model: nn.Module) -> Optimizer:
    model[0].weight.grad_sample = None  # type: ignore[index]
    return SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: SGD([{"params": model.parameters(), "lr": None}], lr=0.1), "but that of SGD is None"),
        (per_sample, "to read `.grad`, but the weights also have `grad_sample`"),
    ],
)
def test_bases_that_are_refused_at_the_start(make: Callable[[nn.Module], Optimizer], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        HAMUOptimizer(make(make_model()), RULE)


@pytest.mark.parametrize(("clear", "sketch"), [("optimizer", None), ("model", None), ("optimizer", 64)])
def test_what_is_cleared_inside_of_a_slot_is_gone(clear: str, sketch: int | None) -> None:
    """The first of two gradients was a mistake: the step is that of the second."""
    ends = []
    for mistake in (False, True):
        model = make_model()
        optimizer = HAMUOptimizer(
            SGD(model.parameters(), lr=0.1), HAMUQ(0.05, radius=FixedRadius(0.1), blocks="global"), sketch=sketch
        )
        retain, forget = make_losses(model)
        if mistake:
            with optimizer.forget():
                (7 * forget).backward(retain_graph=True)
            with optimizer.forget():
                (optimizer if clear == "optimizer" else model).zero_grad()
        optimizer.recompute = lambda name, model=model: make_losses(model)[1].backward()
        with optimizer.forget():
            forget.backward(retain_graph=True)
        with optimizer.retain():
            retain.backward()
        optimizer.step()
        ends.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_copy_knows_nobody_who_decides() -> None:
    """Those hold the trainer and its loaders, which cannot be copied."""

    class Judge:
        is_due, region = False, 1.0

        def __deepcopy__(self, memo: Any) -> Any:
            raise NotImplementedError("holds a loader")

    model = make_model()
    optimizer = wrap_directly(model)
    judge = Judge()
    optimizer.referee, optimizer.approve, optimizer.recompute = judge, lambda report: bool(judge), judge  # type: ignore[assignment]
    twin = copy.deepcopy(optimizer)
    assert twin.referee is twin.approve is twin.recompute is None
    assert optimizer.referee is judge


def test_names_of_tensors_that_are_added_later() -> None:
    model = make_model()
    rule = HAMUQ(0.05, radius=FixedRadius(0.1), blocks="layer")
    optimizer = HAMUOptimizer(SGD(model.parameters(), lr=0.1), rule, model.named_parameters)
    take_step(optimizer, model)
    head = nn.Linear(3, 3)
    model.append(head)
    optimizer.add_param_group({"params": head.parameters()})
    take_step(optimizer, model)
    assert optimizer.last_step is not None and optimizer.last_step.labels == ("0", "2", "3")
    assert copy.deepcopy(optimizer).last_step is not None


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-30), (torch.float32, 1e-41), (torch.bfloat16, 1e-37)])
def test_tiny_gradients_make_steps_of_the_usual_size(size: float, dtype: torch.dtype) -> None:
    """A confident model's: `c/lr` is larger than the largest number of the gradients' own type."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(n, 3, dtype=dtype)) for n in (2, 4)]
    optimizer = HAMUOptimizer(SGD(parameters, lr=1e-4), HAMUQ(size * 1e-3, radius=FixedRadius(0.5)))

    def draw() -> list[Tensor]:
        return [(size * torch.randn(p.shape, generator=generator)).to(dtype) for p in parameters]

    retain, forget = draw(), draw()
    with optimizer.forget():
        for parameter, grad in zip(parameters, forget, strict=True):
            parameter.grad = grad.clone()
    for parameter, grad in zip(parameters, retain, strict=True):
        parameter.grad = grad.clone()
    optimizer.step()
    assert optimizer.last_step is not None and bool(optimizer.last_step.coefficients.is_finite)
    values = optimizer.last_step.coefficients.values
    for parameter, (c, s), a, b in zip(parameters, values, retain, forget, strict=True):
        # Of bfloat16, and of numbers below the normal ones of float32, few digits are known.
        torch.testing.assert_close(parameter.double(), c * a.double() + s * b.double(), rtol=2e-2, atol=1e-3)
        assert float(parameter.detach().norm()) == pytest.approx(0.5, rel=0.02)


def test_factors_that_no_type_can_hold_leave_the_step_out() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = HAMUOptimizer(SGD([parameter], lr=1e-300), HAMUQ(1e-3, radius=FixedRadius(0.5)))
    with optimizer.forget():
        parameter.grad = torch.ones(3)
    parameter.grad = torch.tensor([1.0, 2.0, -1.0])
    optimizer.step()
    assert optimizer.last_step is not None and not bool(optimizer.last_step.coefficients.is_finite)
    assert torch.equal(parameter, torch.ones(3)) and int(optimizer.not_finite_steps) == 1
