"""A mask: the weights outside of it rest exactly, and the step is that of the problem without them."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.optim import SGD

from hamu_lightning.optim import HAMUOptimizer, StepReport
from hamu_lightning.optim._mask import Mask
from hamu_lightning.rules import (
    HAMUQ,
    FineTune,
    FixedRadius,
    GradDiff,
    RelativeRadius,
    Rule,
)
from hamu_lightning.solvers import FeasibleDirection
from tests.optim.doors import BASES, RULE, CountHostReads, make_losses, make_model, take_step
from tests.optim.masks import RULES, Scattered, assert_rest, copy_weights, make_mask, wrap


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_step_is_that_of_the_problem_without_the_rest(rule: Rule) -> None:
    """Gramians, radii, quotas, promises and weights, over several steps."""
    model = make_model(torch.float64)
    mask = make_mask(model)
    before = copy_weights(model)
    small = Scattered(model, mask)
    masked = wrap(model, rule, mask=mask)
    expected = HAMUOptimizer(SGD(small.parameters(), lr=0.1), rule, small.named_parameters())
    for seed in range(3):
        take_step(masked, model, seed)
        take_step(expected, small, seed)
        one, other = masked.last_step, expected.last_step
        assert one is not None
        assert other is not None
        # Float64; sums of the same numbers with zeros between them.
        tolerance = {"rtol": 1e-9, "atol": 1e-12}
        torch.testing.assert_close(one.gramian, other.gramian, **tolerance)
        torch.testing.assert_close(one.coefficients.values, other.coefficients.values, **tolerance)
        torch.testing.assert_close(one.summary(), other.summary(), **tolerance)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter[mask[name]], small.parts[name.replace(".", "/")], rtol=0, atol=1e-12)
    assert_rest(model, before, mask)


def test_quota_and_radius_hold_on_the_weights_that_move() -> None:
    model = make_model(torch.float64)
    mask, before = make_mask(model), copy_weights(model)
    grads = torch.autograd.grad(make_losses(model)[1], list(model.parameters()))
    take_step(wrap(model, HAMUQ(0.02, radius=FixedRadius(0.1)), mask=mask), model)
    moves = [p.detach() - before[name] for name, p in model.named_parameters()]
    assert float(sum((g * d).sum() for g, d in zip(grads, moves, strict=True))) == pytest.approx(0.02, rel=1e-9)
    assert max(float(d.norm()) for d in moves) <= 0.1 * (1 + 1e-9)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("plan", ["combine", "retain_only"])
@pytest.mark.parametrize("rule", [RULE, FineTune()], ids=repr)
def test_weights_rest_under_every_base(base: str, exact: bool, plan: Any, rule: Rule) -> None:
    """Also where it brings momentum from before, and decays weights."""
    model = make_model()
    mask, plain = make_mask(model), BASES[base](model.parameters())
    for seed in range(2):
        plain.zero_grad()
        make_losses(model, seed)[0].backward()
        plain.step()
    before = copy_weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = HAMUOptimizer(plain, rule, model.named_parameters(), exact=exact, mask=mask)
    for seed in range(3):
        optimizer.zero_grad()
        optimizer.plan_step(plan)
        take_step(optimizer, model, seed)
    assert_rest(model, before, mask)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rule", [RULE, FineTune()], ids=repr)
def test_a_mask_of_all_weights_changes_nothing(base: str, rule: Rule) -> None:
    plain, masked = make_model(), make_model()
    mask = {name: torch.ones_like(p, dtype=torch.bool) for name, p in masked.named_parameters()}
    optimizers = [(wrap(plain, rule, base), plain), (wrap(masked, rule, base, mask), masked)]
    for seed in range(3):
        for optimizer, model in optimizers:
            take_step(optimizer, model, seed)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), masked.parameters(), strict=True))


@pytest.mark.parametrize("plan", ["combine", "retain_only"])
def test_the_retain_gradient_of_the_user_stays(plan: Any) -> None:
    model = make_model()
    expected = torch.autograd.grad(make_losses(model)[0], list(model.parameters()))
    optimizer = wrap(model, mask=make_mask(model))
    optimizer.plan_step(plan)
    take_step(optimizer, model)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))  # type: ignore[arg-type]


def test_what_is_not_finite_outside_of_the_mask_is_of_no_account() -> None:
    weight = nn.Parameter(torch.ones(3))
    mask = {weight: torch.tensor([True, True, False])}
    optimizer = HAMUOptimizer(SGD([weight], lr=0.1), HAMUQ(0.01, radius=FixedRadius(0.1)), mask=mask)
    with optimizer.retain():
        (weight * torch.tensor([1.0, 2.0, torch.nan])).sum().backward()
    with optimizer.forget():
        (weight * torch.tensor([2.0, 1.0, torch.inf])).sum().backward()
    optimizer.step()
    assert int(optimizer.applied_steps) == 1
    assert weight[2] == 1
    assert (weight[:2] != 1).all()


def test_a_tensor_that_is_not_named_moves_as_a_whole() -> None:
    """And one that is added later."""
    model, added = make_model(), nn.Parameter(torch.ones(3))
    mask = {"0.weight": torch.zeros(8, 4, dtype=torch.bool)}
    before = copy_weights(model)
    optimizer = wrap(model, mask=mask)
    take_step(optimizer, model)
    assert torch.equal(model.get_parameter("0.weight"), before["0.weight"])
    assert (model.get_parameter("2.weight") != before["2.weight"]).all()
    optimizer.add_param_group({"params": [added]})
    optimizer.zero_grad()
    for context, loss in zip((optimizer.retain, optimizer.forget), make_losses(model, 1), strict=True):
        with context():
            (loss + (added * torch.arange(3)).sum()).backward()
    optimizer.step()
    assert (added[1:] != 1).all()
    assert torch.equal(model.get_parameter("0.weight"), before["0.weight"])


class Shrinks:
    """A referee that asks for a smaller region once, and is content then."""

    region, tries, is_due = 1.0, 0, True

    def judge(self, report: StepReport) -> Any:
        self.tries += 1
        self.region = 0.5
        return "retry" if self.tries == 1 else "accept"


@pytest.mark.parametrize("base", BASES)
def test_steps_on_trial(base: str) -> None:
    model = make_model()
    mask, before = make_mask(model), copy_weights(model)
    optimizer = wrap(model, RULE, base, mask)
    optimizer.referee = referee = Shrinks()
    take_step(optimizer, model)
    assert referee.tries == 2
    assert_rest(model, before, mask)


def test_what_the_weights_did_is_measured_on_those_that_move() -> None:
    model = make_model(torch.float64)
    optimizer = wrap(model, HAMUQ(0.02, radius=FixedRadius(0.1)), mask=make_mask(model), track_actual=True)
    take_step(optimizer, model)
    assert optimizer.last_step is not None
    assert float(optimizer.last_step.improvement("forget")) == pytest.approx(0.02, rel=1e-9)


def test_groups_that_reuse_gradients() -> None:
    rule = FeasibleDirection({"a": 0.01, "b": 0.01}, radius=FixedRadius(0.1))
    model = make_model()
    mask, before = make_mask(model), copy_weights(model)
    optimizer = wrap(model, rule, mask=mask, reuse_groups=True)
    for names in (("a", "b"), ("a",)):
        optimizer.zero_grad()
        for name in ("retain", *names):
            with optimizer.group(name):
                make_losses(model)[name != "retain"].backward()
        optimizer.step()
    assert_rest(model, before, mask)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_keep_the_mask(duplicate: Any) -> None:
    model = make_model()
    mask, before = make_mask(model), copy_weights(model)
    twin, optimizer = duplicate((model, wrap(model, mask=mask)))
    take_step(optimizer, twin)
    assert_rest(twin, before, mask)


@pytest.mark.parametrize("rule", [RULE, HAMUQ(1e-3, radius=RelativeRadius(0.1)), FineTune()], ids=repr)
def test_a_step_reads_nothing_on_the_host(rule: Rule) -> None:
    model = make_model()
    optimizer = wrap(model, rule, mask=make_mask(model))
    for context, loss in zip((optimizer.retain, optimizer.forget), make_losses(model), strict=True):
        with context():
            loss.backward()
    with CountHostReads() as counter:
        optimizer.step()
    assert counter.reads == 0


@pytest.mark.parametrize(("plan", "momentum"), [("combine", 0.0), ("retain_only", 0.0), ("retain_only", 0.9)])
def test_a_step_runs_on_fake_tensors(plan: Any, momentum: float) -> None:
    """With momentum a combined step reads one flag, as it does without a mask."""
    with FakeTensorMode():
        layer = nn.Linear(4, 3)
        base = SGD(layer.parameters(), lr=0.1, foreach=False, momentum=momentum)
        optimizer = HAMUOptimizer(base, FineTune())
        optimizer.rule = HAMUQ(0.05, radius=RelativeRadius(0.1)) if plan == "combine" else FineTune()
        rests = {p: torch.zeros(p.shape, dtype=torch.bool) for p in layer.parameters()}
        optimizer._core.mask = Mask(rests, {p: p.numel() for p in layer.parameters()})
        optimizer._core.layout = None
        for context in (optimizer.retain, optimizer.forget):
            with context():
                layer(torch.randn(2, 4)).sum().backward()
        optimizer.plan_step(plan)
        optimizer.step()


def test_without_a_mask_no_operator_is_added() -> None:
    """With one there is a copy of the retain gradient of each of the four tensors."""

    class CountOperators(CountHostReads):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.count += func in (torch.ops.aten.masked_fill.Scalar, torch.ops.aten.clone.default)
            return func(*args, **(kwargs or {}))

    counts = []
    for mask in (None, make_mask(make_model())):
        model = make_model()
        optimizer = wrap(model, mask=mask)
        for context, loss in zip((optimizer.retain, optimizer.forget), make_losses(model), strict=True):
            with context():
                loss.backward()
        with CountOperators() as counter:
            optimizer.step()
        counts.append(counter.count)
    assert counts == [0, 4]


def test_rules_of_other_blocks_take_turns() -> None:
    """The blocks are those of the rule that is asked."""
    model = make_model()
    optimizer = wrap(model, RULE)
    for rule, blocks in ((HAMUQ(0.01, blocks="global"), 1), (RULE, 4), (GradDiff(), 1)):
        optimizer.rule = rule
        take_step(optimizer, model)
        assert optimizer.last_step is not None
        assert len(optimizer.last_step.labels) == len(optimizer.last_step.gramian) == blocks
