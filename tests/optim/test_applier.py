"""What moves the weights: bases that move them otherwise, exact steps, and what the weights did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.rules import HAMUQ, FixedRadius
from tests.optim.doors import BASES, RULE, Wrap, make_losses, make_model, take_step, weights, wrap_directly


@pytest.mark.parametrize(
    ("base", "words"),
    [("momentum", r"SGD has momentum=0.9, weight_decay=0.01"), ("adam", "Adam has Adam rescales gradients")],
)
def test_bases_that_move_otherwise_are_named(base: str, words: str) -> None:
    with pytest.warns(UserWarning, match=words):
        HAMUOptimizer(BASES[base](make_model().parameters()), RULE)


@pytest.mark.parametrize("base", BASES)
def test_exact_steps_take_only_the_learning_rate_from_the_base(wrap: Wrap, base: str) -> None:
    """`wrap` ignores warnings; that there is none is seen at the scheduler's and the constructor's."""
    model, plain = make_model(), make_model()
    optimizer, reference = wrap(model, base=base, exact=True), wrap(plain)
    assert isinstance(HAMUOptimizer(BASES[base](model.parameters()), RULE, exact=True), HAMUOptimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base, 1, gamma=0.5)
    other = torch.optim.lr_scheduler.StepLR(reference.base, 1, gamma=0.5)
    for seed in range(3):
        take_step(optimizer, model, seed)
        take_step(reference, plain, seed)
        scheduler.step()
        other.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        # float32: d is not divided by lr and multiplied again, in three steps of up to 0.1.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-7)
    assert not optimizer.base.state


def test_exact_steps_follow_a_new_parameter_group() -> None:
    model, late = make_model(), nn.Parameter(torch.ones(3))
    optimizer = wrap_directly(model, base="adam", exact=True)
    take_step(optimizer, model)
    optimizer.add_param_group({"params": [late], "lr": 0.3})
    with optimizer.retain():
        (make_losses(model)[0] + late.sum()).backward()
    with optimizer.forget():
        (make_losses(model)[1] - late.sum()).backward()
    optimizer.step()
    torch.testing.assert_close(late.detach(), torch.full((3,), 1 - 0.1 / 3**0.5))  # the radius of RULE, as one block


@pytest.mark.parametrize("base", BASES)
def test_actual_improvements_are_those_of_the_weights(wrap: Wrap, base: str) -> None:
    model = make_model()
    optimizer = wrap(model, base=base, track_actual=True)
    for seed in range(2):  # momentum needs a past to differ
        before, losses = weights(model), make_losses(model, seed)
        grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
        take_step(optimizer, model, seed)
        moved = [p.detach().double() - old.double() for p, old in zip(model.parameters(), before, strict=True)]
        retain, forget = (sum((g.double() * m).sum() for g, m in zip(row, moved, strict=True)) for row in grads)
        assert optimizer.last_step is not None and optimizer.last_step.actual_improvements is not None
        # The change is rounded once, to float32.
        torch.testing.assert_close(
            optimizer.last_step.actual_improvements, torch.stack((-retain, forget)), rtol=1e-5, atol=1e-7
        )
    coefficients = optimizer.last_step.coefficients
    predicted = torch.stack((coefficients.retain_improvement, coefficients.forget_improvement))
    is_predicted = torch.allclose(optimizer.last_step.actual_improvements, predicted, rtol=1e-4, atol=1e-6)
    assert is_predicted == (base == "sgd")
    assert "actual_forget_improvement" in optimizer.last_step.summary()


def test_exact_steps_follow_tensors_that_are_replaced() -> None:
    """As many other tensors in the groups of the base: these move from then on."""
    old, new = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    base = torch.optim.SGD([old], lr=0.1, momentum=0.9)
    optimizer = HAMUOptimizer(base, HAMUQ(0.01, radius=FixedRadius(0.1)), exact=True)
    for weight in (old, new):
        base.param_groups[0]["params"] = [weight]
        before = weight.detach().clone()
        with optimizer.retain():
            weight.square().sum().backward()
        with optimizer.forget():
            weight.sum().backward()
        optimizer.step()
        assert not torch.equal(weight, before)
