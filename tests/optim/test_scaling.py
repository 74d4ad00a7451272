"""HAMUOptimizer under a loss scaler in a loop of one's own, and steps that 16-bit numbers cannot hold."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from hamu_lightning.errors import HAMUStateError
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.rules import Branch, FineTune, Rule
from tests.optim.doors import RULE, CountHostReads, Wrap, expected_step, make_losses, make_model, take_step, weights

pytestmark = pytest.mark.filterwarnings("ignore:The base optimizer", "ignore:The weights are float16")
BASES: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "adamw": lambda p: AdamW(p, lr=0.01),
    "fused": lambda p: AdamW(p, lr=0.01, fused=True),
}
# For each step what the retain and the forget loss are multiplied by.
FACTORS = [(1.0, 1.0), (torch.inf, 1.0), (1.0, 1.0), (1.0, torch.inf), (torch.nan, torch.nan), (1.0, 1.0)]


def make(base: str = "sgd", rule: Rule = RULE) -> tuple[nn.Module, HAMUOptimizer, torch.amp.GradScaler]:
    model = make_model()
    optimizer = HAMUOptimizer(BASES[base](model.parameters()), rule)
    return model, optimizer, torch.amp.GradScaler("cpu", init_scale=1024.0)


def run_backward(
    order: list[str],
    optimizer: HAMUOptimizer,
    model: nn.Module,
    scaler: torch.amp.GradScaler,
    step: int,
    clears: bool = False,
) -> None:
    """With `zero_grad()` and a plain `backward()`, or with `retain()`."""
    if clears:
        optimizer.zero_grad()
    losses = dict(zip(("retain", "forget"), make_losses(model, step), strict=True))
    factors = dict(zip(("retain", "forget"), FACTORS[step], strict=True))
    for name in order:
        with nullcontext() if clears and name == "retain" else getattr(optimizer, name)():
            scaler.scale(losses[name] * factors[name]).backward(retain_graph=True)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("order", [["retain", "forget"], ["forget", "retain"]])
@pytest.mark.parametrize("clears", [True, False])
def test_own_loop_with_overflows(base: str, order: list[str], clears: bool) -> None:
    """The steps without an overflow are those of a loop without a scaler, whether or not `zero_grad()` is called."""
    (model, optimizer, scaler), (reference, plain, _) = make(base), make(base)
    for step, factors in enumerate(FACTORS):
        run_backward(order, optimizer, model, scaler, step, clears)
        scaler.unscale_(optimizer)
        optimizer.unscale_forget_(scaler)
        scaler.step(optimizer)
        scaler.update()
        if factors == (1.0, 1.0):
            take_step(plain, reference, step)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # float32: sums of numbers 1024 times as large
    assert scaler.get_scale() == 128.0
    assert (optimizer.applied_steps, optimizer.left_out_steps) == (3, 3)


def test_no_host_reads_under_a_scaler() -> None:
    """Of ours: `scaler.step` reads its own flag."""
    model, optimizer, scaler = make()
    run_backward(["forget", "retain"], optimizer, model, scaler, step=3)
    scaler.unscale_(optimizer)
    with CountHostReads() as counter:
        optimizer.unscale_forget_(scaler)
        optimizer.step()
    assert counter.reads == 0
    assert optimizer.not_finite_steps == 1


def test_counters_go_through_the_state() -> None:
    model, optimizer, scaler = make()
    for step in range(len(FACTORS)):
        run_backward(["forget", "retain"], optimizer, model, scaler, step, clears=True)
        optimizer.unscale_forget_(scaler)
        scaler.step(optimizer)
        scaler.update()
    optimizer.approve = lambda report: False
    take_step(optimizer, model)
    optimizer.param_groups[0]["lr"] = 0.0
    take_step(optimizer, model)
    _, other, _ = make()
    other.load_hamu_state_dict(optimizer.hamu_state_dict())
    for counted in (optimizer, other):
        counts = counted.steps, counted.zero_lr_steps, counted.not_finite_steps, counted.dropped_steps
        assert counts == (6, 1, 1, 2)
        assert (counted.applied_steps, counted.left_out_steps) == (3, 4)


def test_fine_tuning_tells_the_scaler_nothing() -> None:
    model, optimizer, scaler = make(rule=FineTune())
    run_backward(["forget", "retain"], optimizer, model, scaler, step=3)
    optimizer.unscale_forget_(scaler)
    scaler.step(optimizer)
    scaler.update()
    assert (scaler.get_scale(), optimizer.applied_steps) == (1024.0, 1)


def test_unscaling_twice_or_nothing_is_an_error() -> None:
    model, optimizer, scaler = make()
    with pytest.raises(HAMUStateError, match="Expected a forget gradient to unscale, but there is none"):
        optimizer.unscale_forget_(scaler)
    run_backward(["retain", "forget"], optimizer, model, scaler, step=0)
    optimizer.unscale_forget_(scaler)
    with pytest.raises(HAMUStateError, match="Expected one `unscale_forget_` per step"):
        optimizer.unscale_forget_(scaler)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    take_step(optimizer, model)
    optimizer.unscale_forget_(disabled)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_take_no_part_in_the_step(copier: Callable[[Any], Any]) -> None:
    model, optimizer, scaler = make()
    run_backward(["retain", "forget"], optimizer, model, scaler, step=0)
    optimizer.unscale_forget_(scaler)
    twin, twin_optimizer = copier((model, optimizer))
    scaler.step(optimizer)
    scaler.update()
    twin_optimizer.release_forget()
    twin_optimizer.zero_grad()
    take_step(twin_optimizer, twin)
    torch.testing.assert_close(weights(twin), weights(model), rtol=1e-6, atol=1e-7)


def half_step(base: str, **options: bool) -> tuple[nn.Module, HAMUOptimizer, list[Tensor], list[Tensor]]:
    """One step of float16 weights at a learning rate where the equivalent gradient is 1e7 times the step."""
    model = make_model(torch.float16)
    optimizer = HAMUOptimizer(BASES[base](model.parameters()), RULE, **options)
    optimizer.param_groups[0]["lr"] = 1e-7
    before, expected = weights(model), [step for step, _ in expected_step(model, RULE, 1e-7)]
    take_step(optimizer, model)
    return model, optimizer, before, expected


@pytest.mark.parametrize("base", BASES)
def test_an_equivalent_gradient_too_large_for_float16_is_left_out(base: str) -> None:
    model, optimizer, before, _ = half_step(base)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (optimizer.applied_steps, optimizer.left_out_steps) == (0, 1)
    assert optimizer.last_step is not None
    assert (optimizer.last_step.coefficients.branch == Branch.NOT_FINITE).all()
    assert optimizer.last_step.coefficients.forget_improvement == 0


@pytest.mark.parametrize("base", BASES)
def test_exact_steps_are_not_divided_by_the_learning_rate(base: str) -> None:
    model, optimizer, before, expected = half_step(base, exact=True)
    for old, step, new in zip(before, expected, model.parameters(), strict=True):
        resolution = torch.finfo(torch.float16).eps * (old.abs().max() + 2 * step.abs().max())
        assert ((new.detach().double() - old.double() - step).abs() <= resolution).all()
    assert optimizer.applied_steps == 1


@pytest.mark.parametrize("target", ["wrapper", "base"])
@pytest.mark.parametrize("reason", ["zero lr", "dropped", "rejected", "not finite"])
def test_schedulers_do_not_warn_of_steps_that_were_left_out(target: str, reason: str) -> None:
    """A warning is an error."""
    model, optimizer, _ = make("adamw")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer if target == "wrapper" else optimizer.base, 1)
    if reason == "zero lr":
        optimizer.param_groups[0]["lr"] = 0.0
    elif reason == "dropped":
        optimizer.plan_step("drop")
    elif reason == "rejected":
        optimizer.approve = lambda report: False
    else:
        model.get_parameter("0.bias").data.fill_(torch.nan)
    take_step(optimizer, model)
    scheduler.step()
    assert optimizer.applied_steps == 0


def test_grad_scaler_unscales_both_slots(wrap: Wrap) -> None:
    model, reference = make_model(), make_model()
    optimizer, scaler = wrap(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    retain, forget = make_losses(model)
    with optimizer.retain():
        scaler.scale(retain).backward(retain_graph=True)
    with optimizer.forget():
        scaler.scale(forget).backward()
    scaler.unscale_(optimizer)
    optimizer.unscale_forget_(scaler)
    scaler.step(optimizer)
    scaler.update()
    take_step(wrap(reference), reference)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_forget_overflow_backs_off_and_leaves_the_step_out(wrap: Wrap) -> None:
    model = make_model()
    optimizer, scaler, before = wrap(model), torch.amp.GradScaler("cpu", init_scale=1024.0), weights(model)
    retain, forget = make_losses(model)
    with optimizer.retain():
        scaler.scale(retain).backward(retain_graph=True)
    with optimizer.forget():
        scaler.scale(forget * torch.inf).backward()
    optimizer.unscale_forget_(scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
