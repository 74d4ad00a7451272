"""The methods that HAMU is compared with, against slow programs written from their papers.

A new method is one more entry in `ENTRIES`: its rule, and an oracle that gives the direction of descent for the two
descent gradients, those of the retain loss and of the negative forget loss. Nothing in an oracle knows of Gramians or
of the sign that the package turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from hamu_lightning import HAMUCallback, HAMUOptimizer
from hamu_lightning.gramian import compute_gramian
from hamu_lightning.rules import (
    GRU,
    MGDA,
    Branch,
    Coefficients,
    CombinationRule,
    GradAscent,
    GradDiff,
    MUNBa,
    NGDiff,
    PCGrad,
)
from tests.callbacks.modules import Base, build, fit
from tests.oracles import draw_vectors, gramian_of

# float64 through a Gramian of a few hundred products, a root and a quotient: a few 1e-16 of gradients near 1, and
# 5e-11 of the cosine where gradients count as parallel.
TOLERANCE = 1e-8

Oracle = Callable[[Tensor, Tensor], Tensor]


# The papers ---------------------------------------------------------------------------------------------------------


def project_off(a: Tensor, b: Tensor) -> Tensor:
    """PCGrad's line: where `a` points against `b`, its part along `b` goes."""
    return a - (a @ b) / (b @ b) * b if a @ b < 0 else a


def surgery(retain: Tensor, forget: Tensor) -> Tensor:
    """Yu et al. 2020, Algorithm 1: project each on the normal plane of the other, then sum."""
    tasks = [retain, forget]
    projected = [t.clone() for t in tasks]
    for i in range(2):
        for j in range(2):
            if i != j:
                projected[i] = project_off(projected[i], tasks[j])
    return projected[0] + projected[1]


def shortest(retain: Tensor, forget: Tensor) -> Tensor:
    """The min-norm point of the segment: where its squared length stops falling, by bisection."""

    def point(t: float) -> Tensor:
        return t * retain + (1 - t) * forget

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if point(middle) @ (retain - forget) < 0 else (low, middle)
    return point(low)


def bargain(retain: Tensor, forget: Tensor) -> Tensor:
    """Nash's condition `G'G w = 1/w` by Newton's method on the convex `w'G'Gw / 2 - sum log w`."""
    units = torch.stack((retain.norm(), forget.norm()))
    unit_gradients = torch.stack((retain, forget)) / units.unsqueeze(1)
    gram, w = unit_gradients @ unit_gradients.T, torch.ones(2, dtype=retain.dtype)
    for _ in range(200):
        step = torch.linalg.solve(gram + torch.diag(w**-2), gram @ w - 1 / w)
        w = w - step / (1 + (step / w).abs().max())  # damped: w stays positive
    return w @ unit_gradients  # weights of the gradients themselves are w / units


ENTRIES: list[tuple[CombinationRule, Oracle]] = [
    (GradAscent(), lambda retain, forget: forget),
    (GradDiff(), lambda retain, forget: retain + forget),
    (GradDiff(0.3), lambda retain, forget: retain + 0.3 * forget),
    (PCGrad(), surgery),
    (GRU(), lambda retain, forget: project_off(forget, retain)),
    (NGDiff(), lambda retain, forget: retain / retain.norm() + forget / forget.norm()),
    (MGDA(), shortest),
    (MUNBa(), bargain),
]
RULES = [rule for rule, _ in ENTRIES]

entries = pytest.mark.parametrize(("rule", "oracle"), ENTRIES, ids=[repr(rule) for rule in RULES])
every_rule = pytest.mark.parametrize("rule", RULES, ids=repr)
situations = pytest.mark.parametrize("conflict", [True, False], ids=["conflict", "no conflict"])


# A small model, and its losses ---------------------------------------------------------------------------------------


def make_batches(conflict: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A retain batch and a forget batch, whose labels agree with it (to forget them hurts) or contradict it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(32, 10, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return (x[:16], y[:16]), (x[16:], y[16:] if conflict else (y[16:] + 1) % 3)


def make_model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def flat(tensors: object) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])  # type: ignore[attr-defined]


def descent_gradients(model: nn.Module, conflict: bool) -> tuple[Tensor, Tensor]:
    """Of the two objectives that are to be lowered: the retain loss, and the negative forget loss."""
    (x, y), (forget_x, forget_y) = make_batches(conflict)
    objectives = (cross_entropy(model(x), y), -cross_entropy(model(forget_x), forget_y))
    retain, forget = (flat(torch.autograd.grad(objective, [*model.parameters()])) for objective in objectives)
    assert (retain @ forget < 0) == conflict
    return retain, forget


def take_step(model: nn.Module, optimizer: HAMUOptimizer, conflict: bool) -> Coefficients:
    (x, y), (forget_x, forget_y) = make_batches(conflict)
    with optimizer.retain():
        cross_entropy(model(x), y).backward()
    with optimizer.forget():
        cross_entropy(model(forget_x), forget_y).backward()
    optimizer.step()
    assert optimizer.last_step is not None
    return optimizer.last_step.coefficients


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


@entries
@situations
def test_the_weights_take_the_papers_step(rule: CombinationRule, oracle: Oracle, conflict: bool) -> None:
    model = make_model()
    before, (retain, forget) = flat(model.parameters()).detach(), descent_gradients(model, conflict)
    report = take_step(model, HAMUOptimizer(SGD(model.parameters(), lr=0.1), rule), conflict)
    change = flat(model.parameters()).detach() - before
    assert_close(change, -0.1 * oracle(retain, forget))
    # What the step promises is what it does to both objectives, to first order.
    assert_close(report.retain_improvement, -retain @ change)
    assert_close(report.forget_improvement, -forget @ change)
    assert_close(report.radius[0], change.norm())
    assert report.branch.tolist() == [Branch.DIRECT]
    assert report.block_feasible.all()
    assert report.total_quota == 0
    assert report.margin == report.feasible_improvement


@entries
@situations
def test_groups_share_one_problem(rule: CombinationRule, oracle: Oracle, conflict: bool) -> None:
    """The gradient as a whole decides the weights, and each group moves at its own rate."""
    model, rates = make_model(), (0.1, 0.02)
    before, direction = flat(model.parameters()).detach(), oracle(*descent_gradients(model, conflict))
    groups = [{"params": model[i].parameters(), "lr": lr} for i, lr in zip((0, 2), rates, strict=True)]  # type: ignore[index]
    report = take_step(model, HAMUOptimizer(SGD(groups), rule), conflict)
    sizes = torch.tensor([sum(p.numel() for p in model[i].parameters()) for i in (0, 2)])  # type: ignore[index]
    change = flat(model.parameters()).detach() - before
    assert_close(change, -torch.tensor(rates, dtype=torch.float64).repeat_interleave(sizes) * direction)
    assert_close(report.radius, torch.stack([part.norm() for part in change.split(sizes.tolist())]))


@entries
@situations
def test_blocks_can_be_weighed_one_by_one(rule: CombinationRule, oracle: Oracle, conflict: bool) -> None:
    model = make_model()
    rule = type(rule)(**{**vars(rule), "blocks": "tensor"})
    before, sizes = flat(model.parameters()).detach(), [p.numel() for p in model.parameters()]
    parts = zip(*(g.split(sizes) for g in descent_gradients(model, conflict)), strict=True)
    expected = torch.cat([-0.1 * oracle(*part) for part in parts])
    take_step(model, HAMUOptimizer(SGD(model.parameters(), lr=0.1), rule), conflict)
    assert_close(flat(model.parameters()).detach() - before, expected)


@entries
@situations
def test_a_trainer_takes_the_papers_step(rule: CombinationRule, oracle: Oracle, conflict: bool) -> None:
    module = build(Base).double()
    retain_batch, forget_batch = (TensorDataset(*batch) for batch in make_batches(conflict))
    before, direction = flat(module.parameters()).detach(), oracle(*descent_gradients(module.net, conflict))
    fit(
        module,
        HAMUCallback(DataLoader(forget_batch, batch_size=16), rule),
        loader=DataLoader(retain_batch, batch_size=16),
        max_epochs=1,
        log_every_n_steps=1,
    )
    assert_close(flat(module.parameters()).detach() - before, -0.05 * direction)


# The sign ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [PCGrad(), GRU()], ids=repr)
def test_the_conflict_test_is_not_inverted(rule: CombinationRule) -> None:
    """On the raw product, `g_r·g_f < 0` would project where both objectives agree, and never in conflict.

    In conflict GRU would then be gradient ascent and PCGrad the gradient difference: here both spare the retain loss.
    """
    naive = {PCGrad: GradDiff(), GRU: GradAscent()}[type(rule)]  # type: ignore[index]
    for cosine in (0.9, 0.1, -0.1, -0.9):
        gramian = torch.tensor([[[1.0, 2 * cosine], [2 * cosine, 4.0]]], dtype=torch.float64)
        ours, unprojected = (r.coefficients(gramian, lr=0.1) for r in (rule, naive))
        if cosine > 0:  # a conflict
            assert ours.retain_improvement >= -1e-16
            assert ours.retain_improvement > unprojected.retain_improvement + 0.01
            assert ours.forget_improvement > 0
        else:
            torch.testing.assert_close(ours.values, unprojected.values, rtol=1e-15, atol=0)


def test_both_objectives_improve_where_they_can() -> None:
    """What PCGrad, MGDA and MUNBa promise: to first order no step harms either objective."""
    gramian = gramian_of(*torch.randn(2, 200, 3, dtype=torch.float64))
    for method in (PCGrad, MGDA, MUNBa):
        step = method(blocks="tensor").coefficients(gramian, lr=0.1)
        forget_gain = (step.values * gramian[:, :, 1]).sum(dim=1)
        retain_gain = -(step.values * gramian[:, :, 0]).sum(dim=1)
        assert (torch.minimum(forget_gain, retain_gain) > -1e-12).all()  # rounding


def test_the_bargain_gives_both_players_the_same_share() -> None:
    """At Nash's solution `w_i a_i·(w_r a_r + w_f a_f) = 1` for both: equal gains, in units of their own weight."""
    gramian = gramian_of(*torch.randn(2, 50, 3, dtype=torch.float64))
    values = MUNBa(blocks="tensor").coefficients(gramian, lr=1.0).values
    torch.testing.assert_close(values * (gramian @ values.unsqueeze(2)).squeeze(2), torch.ones(50, 2).double())


def ask(rule: CombinationRule, retain: Tensor, forget: Tensor, lr: float = 0.1) -> tuple[Tensor, Coefficients]:
    """The step for raw gradients `[D]`, and what the rule says of it."""
    result = rule.coefficients(gramian_of(retain.unsqueeze(0), forget.unsqueeze(0)), lr=lr)
    return result.values[0, 0] * retain + result.values[0, 1] * forget, result


@every_rule
def test_one_bad_number_stops_every_block(rule: CombinationRule) -> None:
    rests = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.0], dtype=torch.float64)  # a rest does not excuse a bad number
    for bad in (math.nan, math.inf, -math.inf):
        for lr, entries in ((0.1, [(0, 0)]), (0.1, [(1, 1)]), (0.1, [(0, 1), (1, 0)]), (rests, [(0, 0)]), (bad, [])):
            gramian = gramian_of(*draw_vectors(5))
            for i, j in entries:
                gramian[5, i, j] = bad
            result = rule.coefficients(gramian, lr=lr)
            assert (result.values == 0).all()
            assert (result.branch == Branch.NOT_FINITE).all()
            assert not result.block_feasible.any()
            assert result.forget_improvement == result.retain_improvement == result.feasible_improvement == 0


@every_rule
def test_blocks_without_learning_rate_are_as_if_frozen(rule: CombinationRule) -> None:
    gramian = gramian_of(*draw_vectors(4))
    lr = torch.tensor([0.1, 0.1, 0.0, 0.1, 0.0, 0.1], dtype=torch.float64)
    values = rule.coefficients(gramian, lr=lr).values
    assert (values[lr == 0] == 0).all()
    # Their zeros may change the order of a sum.
    torch.testing.assert_close(values[lr > 0], rule.coefficients(gramian[lr > 0], lr=0.1).values, rtol=1e-14, atol=0)


# Blocks, host, float32 ------------------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("blocks", ["global", "tensor"])
def test_a_step_reads_nothing_on_the_host(rule: CombinationRule, blocks: str) -> None:
    """FakeTensorMode raises at every host read."""
    with FakeTensorMode():
        model = nn.Linear(4, 3)
        optimizer = HAMUOptimizer(
            SGD(model.parameters(), lr=0.1, foreach=False), type(rule)(**{**vars(rule), "blocks": blocks})
        )
        for context in (optimizer.retain, optimizer.forget):
            with context():
                model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        assert optimizer.last_step is not None
        assert optimizer.last_step.summary()["margin"].shape == ()


@entries
def test_float32_gradients(rule: CombinationRule, oracle: Oracle) -> None:
    torch.manual_seed(1)
    retain, forget = torch.randn(2, 1000)
    values = rule.coefficients(compute_gramian([retain], [forget]), lr=1.0).values[0].float()
    expected = oracle(retain.double(), -forget.double())
    # One rounding of float32 per element.
    torch.testing.assert_close(-(values[0] * retain + values[1] * forget).double(), expected, rtol=1e-5, atol=1e-6)
