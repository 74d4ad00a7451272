"""The contract of the wrapper: it is an optimizer, and it applies the rule's step, the whole step, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim import SGD

from hamu_lightning.errors import HAMUStateError
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.rules import HAMUQ, HAMUU, Branch, FineTune, FixedRadius, LearningRateRadius, RelativeRadius, Rule
from tests.optim.doors import (
    BASES,
    RULE,
    CountHostReads,
    Wrap,
    expected_step,
    make_losses,
    make_model,
    take_step,
    weights,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        HAMUQ(1e-3),
        HAMUU(1e-3, radius=LearningRateRadius()),
        HAMUQ(0.01, radius=RelativeRadius(0.01), allocation="optimal"),
        FineTune(),
    ],
    ids=repr,
)
def test_plain_sgd_moves_the_weights_by_d(wrap: Wrap, rule: Rule, dtype: torch.dtype) -> None:
    model = make_model(dtype)
    before, asked = weights(model), expected_step(model, rule, 0.1)
    grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in make_losses(model)]
    optimizer = wrap(model, rule)
    take_step(optimizer, model)
    assert optimizer.last_step is not None
    values = optimizer.last_step.coefficients.values
    for old, c, r, f, new, (step, _) in zip(before, values, *grads, model.parameters(), asked, strict=True):
        terms = c[0] * r.double(), c[1] * f.double()
        # One unit in the last place of the weight; and the step itself is a sum of two terms in the weights' dtype.
        eps, moved = torch.finfo(dtype).eps, new.detach().double() - old.double()
        tolerance = eps * torch.maximum(old.abs(), new.detach().abs()) + 4 * eps * (terms[0].abs() + terms[1].abs())
        assert ((moved - terms[0] - terms[1]).abs() <= tolerance).all()
        # The wrapper asked the rule the right question: Gramians summed in another order, some of them nearly parallel.
        torch.testing.assert_close(moved, step, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_fine_tuning_is_the_base_optimizer_bit_for_bit(wrap: Wrap, base: str) -> None:
    plain, wrapped = make_model(), make_model()
    optimizer, wrapper = BASES[base](plain.parameters()), wrap(wrapped, FineTune(), base)
    for seed in range(4):
        optimizer.zero_grad()
        make_losses(plain, seed)[0].backward()
        optimizer.step()
        take_step(wrapper, wrapped, seed)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True))


def test_fine_tuning_does_not_read_a_forget_gradient_of_nan(wrap: Wrap) -> None:
    model = make_model()
    optimizer = wrap(model, FineTune())
    plain = make_model()
    make_losses(plain)[0].backward()
    BASES["sgd"](plain.parameters()).step()
    retain, forget = make_losses(model)
    with optimizer.retain():
        retain.backward(retain_graph=True)
    with optimizer.forget():
        (forget * torch.nan).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("which", ["retain", "forget", "neither"])
def test_one_objective_alone_is_never_applied(wrap: Wrap, which: str) -> None:
    model = make_model()
    optimizer, before = wrap(model), weights(model)
    retain, forget = make_losses(model)
    if which == "retain":
        with optimizer.retain():
            retain.backward()
    if which == "forget":
        with optimizer.forget():
            forget.backward()
    with pytest.raises(HAMUStateError, match="gradients? (is|are) missing. Run each objective's backward"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_gradients_of_the_last_step_are_not_used_again(wrap: Wrap) -> None:
    model = make_model()
    optimizer = wrap(model)
    take_step(optimizer, model)
    with optimizer.forget():
        make_losses(model)[1].backward()
    with pytest.raises(HAMUStateError, match="the retain gradient is missing"):
        optimizer.step()
    # Without zero_grad(), a second step accumulates nothing from the first.
    expected = [p + d for p, (d, _) in zip(weights(model), expected_step(model, RULE, 0.1, seed=5), strict=True)]
    optimizer.release_forget()
    take_step(optimizer, model, seed=5)
    for a, b in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(b.detach().double(), a, rtol=1e-5, atol=1e-6)


def test_gradients_accumulate_in_both_slots(wrap: Wrap) -> None:
    model, twice = make_model(torch.float64), make_model(torch.float64)
    optimizer = wrap(model)
    for _ in range(3):
        retain, forget = make_losses(model)
        with optimizer.forget():
            (forget / 3).backward(retain_graph=True)
        with optimizer.retain():
            (retain / 3).backward()
    optimizer.step()
    take_step(wrap(twice), twice)
    for a, b in zip(model.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)  # float64 rounding of thirds


def test_short_window_scales_to_the_mean(wrap: Wrap) -> None:
    """Two retain and one forget loss of three came, and losses were divided by three: the step is that of the means."""
    model, reference = make_model(torch.float64), make_model(torch.float64)
    optimizer, other = wrap(model, track_actual=True), wrap(reference)
    retain, forget = make_losses(model)
    with optimizer.retain():
        (retain * 2 / 3).backward(retain_graph=True)
    with optimizer.forget():
        (forget / 3).backward()
    optimizer.plan_step(window_shares=(2 / 3, 1 / 3))
    optimizer.step()
    step = optimizer.last_step
    assert step is not None and step.actual_improvements is not None
    predicted = torch.stack((step.coefficients.retain_improvement, step.coefficients.forget_improvement))
    torch.testing.assert_close(step.actual_improvements, predicted)
    take_step(other, reference)
    for seed in (1, 2):  # windows are full again
        take_step(optimizer, model, seed)
        take_step(other, reference, seed)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_exception_in_the_forget_pass_leaves_grad_alone(wrap: Wrap) -> None:
    model = make_model()
    optimizer = wrap(model)
    make_losses(model)[0].backward()
    before = [p.grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), optimizer.forget():
        make_losses(model)[1].backward()
        _ = 1 / 0
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    assert not optimizer.has_forget_gradient


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("stream", ["retain", "forget"])
def test_a_step_that_is_not_finite_is_left_out(wrap: Wrap, base: str, stream: str) -> None:
    model = make_model()
    optimizer = wrap(model, base=base)
    take_step(optimizer, model)
    before = weights(model)
    for name, loss in zip(("retain", "forget"), make_losses(model), strict=True):
        with getattr(optimizer, name)():
            (loss * (torch.nan if name == stream else 1.0)).backward(retain_graph=True)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.not_finite_steps == 1
    assert optimizer.last_step is not None
    assert (optimizer.last_step.coefficients.branch == Branch.NOT_FINITE).all()


@pytest.mark.parametrize("base", BASES)
def test_zero_learning_rate_moves_and_breaks_nothing(wrap: Wrap, base: str) -> None:
    model = make_model()
    optimizer = wrap(model, HAMUQ(1e-3), base)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weights(model)
    take_step(optimizer, model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.zero_lr_steps == 1
    optimizer.param_groups[0]["lr"] = 0.1
    take_step(optimizer, model)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(before[0], next(model.parameters()))


@pytest.mark.parametrize(
    "rule", [RULE, HAMUQ(1e-3, radius=RelativeRadius(0.1), allocation="optimal"), FineTune()], ids=repr
)
def test_no_host_reads_in_step(wrap: Wrap, rule: Rule) -> None:
    model = make_model()
    optimizer = wrap(model, rule)
    take_step(optimizer, model)
    retain, forget = make_losses(model)
    with optimizer.retain():
        retain.backward(retain_graph=True)
    with optimizer.forget():
        forget.backward()
    with CountHostReads() as counter:
        optimizer.step()
        assert optimizer.last_step is not None
        optimizer.last_step.summary()
    assert counter.reads == 0


def test_step_runs_on_fake_tensors() -> None:
    with FakeTensorMode():
        take_step_on = nn.Linear(4, 3)
        optimizer = HAMUOptimizer(SGD(take_step_on.parameters(), lr=0.1, foreach=False), RULE)
        for context in (optimizer.retain, optimizer.forget):
            with context():
                take_step_on(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        assert optimizer.last_step is not None


def test_parameters_of_one_stream_only() -> None:
    """A parameter that only one objective uses moves by that objective alone; an unused one rests."""
    used_by_both, retain_only, forget_only, unused = (nn.Parameter(torch.ones(3)) for _ in range(4))
    base = SGD([used_by_both, retain_only, forget_only, unused], lr=0.1)
    optimizer = HAMUOptimizer(base, HAMUQ(0.01, radius=FixedRadius(0.1)))
    with optimizer.retain():
        (used_by_both + retain_only).square().sum().backward()
    with optimizer.forget():
        (used_by_both * forget_only).sum().backward()
    optimizer.step()
    assert (retain_only < 1).all()
    assert (forget_only > 1).all()
    assert torch.equal(unused, torch.ones(3))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("sparse", [True, False])
def test_sparse_embedding_gradients(sparse: bool) -> None:
    def run(is_sparse: bool) -> Tensor:
        torch.manual_seed(0)
        embedding = nn.Embedding(6, 3, sparse=is_sparse)
        optimizer = HAMUOptimizer(SGD(embedding.parameters(), lr=0.1), RULE)
        with optimizer.retain():
            embedding(torch.tensor([0, 1, 1])).square().sum().backward()
        with optimizer.forget():
            embedding(torch.tensor([1, 4])).sum().backward()
        optimizer.step()
        return embedding.weight.detach()

    torch.testing.assert_close(run(sparse), run(False))


def test_half_precision_weights(wrap: Wrap) -> None:
    """Sums in float32 or wider; the step is right to the resolution of the weights."""
    model = make_model(torch.bfloat16)
    before, expected = weights(model), expected_step(model, RULE, 0.1)
    take_step(wrap(model), model)
    for old, (step, _), new in zip(before, expected, model.parameters(), strict=True):
        resolution = torch.finfo(torch.bfloat16).eps * (old.abs().max() + 2 * step.abs().max())
        assert ((new.detach().double() - old.double() - step).abs() <= resolution).all()
