"""TorchJD's weightings as rules: against their definitions on descent gradients, and against TorchJD itself."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import cvxpy as cp
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from torchjd.aggregation import (
    CAGrad,
    CRMOGMWeighting,
    ExcessMTL,
    ExcessMTLWeighting,
    GradDrop,
    GradVacWeighting,
    KrumWeighting,
    MeanWeighting,
    MGDAWeighting,
    MoDoWeighting,
    NashMTL,
    PCDWeighting,
    PCGradWeighting,
    UPGrad,
    UPGradWeighting,
)
from torchjd.linalg import QuadprogProjector

from hamu_lightning import HAMUCallback, HAMUOptimizer
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.rules import MGDA, Branch, MUNBa, PCGrad
from hamu_lightning.solvers import FromTorchJD
from tests.callbacks.modules import Base, build, fit
from tests.oracles import draw_vectors, gramian_of
from tests.rules.test_baselines import descent_gradients, flat, make_batches, make_model, take_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP:UserWarning"),
]

situations = pytest.mark.parametrize("conflict", [True, False], ids=["conflict", "no conflict"])


def upgrad() -> UPGradWeighting:
    """Without the thresholds that move the answer by up to 1e-4."""
    return UPGradWeighting(projector=QuadprogProjector(norm_eps=0.0, reg_eps=1e-13))


def draw_gramian(conflict: bool = True) -> Tensor:
    retain, forget = torch.randn(2, 5, dtype=torch.float64)
    forget = forget if (retain @ forget > 0) == conflict else -forget
    return gramian_of(retain.unsqueeze(0), forget.unsqueeze(0))


def project_on_dual_cone(vector: Tensor, gradients: Tensor) -> Tensor:
    """Quinton & Rey 2024, equation 3: the nearest vector that no gradient points against."""
    x = cp.Variable(gradients.shape[1])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - vector.numpy())), [gradients.numpy() @ x >= 0])
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
    return torch.tensor(x.value)


# Definitions --------------------------------------------------------------------------------------------------------


@situations
def test_upgrad_projects_each_descent_gradient_on_the_dual_cone(conflict: bool) -> None:
    """The mean of the projections; for two objectives that is half of PCGrad's step."""
    model = make_model()
    before, gradients = flat(model.parameters()).detach(), torch.stack(descent_gradients(model, conflict))
    expected = torch.stack([project_on_dual_cone(g, gradients) for g in gradients]).mean(dim=0)
    report = take_step(model, HAMUOptimizer(SGD(model.parameters(), lr=0.1), FromTorchJD(upgrad())), conflict)
    change = flat(model.parameters()).detach() - before
    torch.testing.assert_close(change, -0.1 * expected, rtol=0, atol=1e-7)  # the cone solver's
    half = PCGrad().coefficients(report.gramian, lr=0.05).values
    torch.testing.assert_close(report.values, half, rtol=1e-9, atol=0)  # quadprog's
    torch.testing.assert_close(report.radius[0], change.norm())
    assert report.branch.tolist() == [Branch.DIRECT]


@pytest.mark.parametrize("blocks", ["global", "tensor"])
def test_two_implementations_agree(blocks: Any) -> None:
    """Theirs of MGDA and PCGrad, and ours: written apart, from the papers."""
    retain, forget = torch.randn(2, 20, 4, dtype=torch.float64)
    gramian, lr = gramian_of(retain, forget), torch.linspace(0, 0.3, 20, dtype=torch.float64)
    for theirs, ours in ((MGDAWeighting(), MGDA(blocks=blocks)), (PCGradWeighting(), PCGrad(blocks=blocks))):
        values = FromTorchJD(theirs, blocks=blocks).coefficients(gramian, lr=lr).values
        torch.testing.assert_close(values, ours.coefficients(gramian, lr=lr).values, rtol=1e-12, atol=1e-15)


@situations
def test_nash_mtl_goes_where_munba_goes(conflict: bool) -> None:
    """The same condition; Nash-MTL solves it to 1e-3, for a Gramian of its own unit."""
    gramian = draw_gramian(conflict)
    values = FromTorchJD(NashMTL(n_tasks=2, max_norm=0.0)).coefficients(gramian, lr=0.1).values[0]
    expected = MUNBa().coefficients(gramian, lr=0.1).values[0]
    torch.testing.assert_close(values / values.norm(), expected / expected.norm(), rtol=0, atol=1e-2)


AGGREGATORS: list[Callable[[int], Any]] = [
    lambda n: UPGrad(),
    lambda n: CAGrad(c=0.4),
    lambda n: NashMTL(n_tasks=n),
]


@pytest.mark.parametrize("make", AGGREGATORS, ids=["UPGrad", "CAGrad", "NashMTL"])
@pytest.mark.parametrize("forget_groups", [1, 2])
def test_several_groups(make: Callable[[int], Any], forget_groups: int) -> None:
    """Retain, protected groups, forget groups: as TorchJD aggregates the explicit descent gradients."""
    raw = torch.randn(4, 6, dtype=torch.float64)
    signs = torch.tensor([1.0] * (4 - forget_groups) + [-1.0] * forget_groups, dtype=torch.float64)
    values = FromTorchJD(make(4), forget_groups=forget_groups).values((raw @ raw.T).unsqueeze(0), lr=0.1)
    expected = -0.1 * make(4)(signs.unsqueeze(1) * raw)
    # The square root of the Gramian is not the matrix itself: NashMTL's inner solver ends 1e-6 apart.
    torch.testing.assert_close(values[0] @ raw, expected, rtol=1e-5, atol=1e-6)


@situations
def test_a_trainer_takes_the_step(conflict: bool) -> None:
    module = build(Base).double()
    retain_batch, forget_batch = (TensorDataset(*batch) for batch in make_batches(conflict))
    before, gradients = flat(module.parameters()).detach(), descent_gradients(module.net, conflict)
    fit(
        module,
        HAMUCallback(DataLoader(forget_batch, batch_size=16), FromTorchJD(UPGrad())),
        loader=DataLoader(retain_batch, batch_size=16),
        max_epochs=1,
        log_every_n_steps=1,
    )
    expected = before - 0.05 * UPGrad()(torch.stack(gradients))
    torch.testing.assert_close(flat(module.parameters()).detach(), expected, rtol=1e-9, atol=1e-9)


# Blocks and scales --------------------------------------------------------------------------------------------------


def test_groups_share_one_problem() -> None:
    retain, forget = draw_vectors(4)
    gramian = gramian_of(retain, forget)
    lr = torch.tensor([0.1, 0.1, 0.0, 0.2, 0.0, 0.1], dtype=torch.float64)
    rule = FromTorchJD(UPGrad())
    values = rule.coefficients(gramian, lr=lr).values
    whole = rule.coefficients(gramian[lr > 0].sum(dim=0, keepdim=True), lr=1.0).values
    torch.testing.assert_close(values, lr.unsqueeze(1) * whole, rtol=1e-12, atol=0)


def test_small_gradients_need_a_small_threshold() -> None:
    """TorchJD's default takes a trained model's gradients for zero; its own setting cures that."""
    gramian = draw_gramian()
    expected = FromTorchJD(upgrad()).coefficients(gramian, lr=0.1).values
    small = FromTorchJD(upgrad()).coefficients(1e-12 * gramian, lr=0.1).values
    torch.testing.assert_close(small, expected, rtol=1e-9, atol=0)
    ignored = FromTorchJD(UPGrad()).coefficients(1e-12 * gramian, lr=0.1).values
    torch.testing.assert_close(ignored, torch.tensor([[-0.05, 0.05]], dtype=torch.float64))


def test_without_gradients_nothing_moves() -> None:
    for weighting in (upgrad(), MGDAWeighting(), NashMTL(n_tasks=2)):
        result = FromTorchJD(weighting).coefficients(torch.zeros(3, 2, 2), lr=0.1)
        assert (result.values == 0).all()
        assert (result.branch == Branch.DIRECT).all()


# State --------------------------------------------------------------------------------------------------------------

STATEFUL: dict[str, Callable[..., Any]] = {
    "NashMTL": lambda update=3: NashMTL(n_tasks=2, update_weights_every=update),
    "GradVac": lambda beta=0.5: GradVacWeighting(beta=beta),
    "PCD": lambda beta=0.9: PCDWeighting(beta=beta),
    "CR-MOGM": lambda alpha=0.9: CRMOGMWeighting(GradVacWeighting(), alpha=alpha),
}
stateful = pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)


def walk(rule: FromTorchJD, first: int, last: int) -> Tensor:
    """The answers to a sequence of Gramians."""
    answers = torch.zeros(last - first, 2, 2, dtype=torch.float64)
    for answer, seed in zip(answers, range(first, last), strict=True):
        torch.manual_seed(seed)  # GradVac draws an order
        answer[:] = rule.coefficients(gramian_of(*torch.randn(2, 2, 5, dtype=torch.float64)), lr=0.1).values
    return answers


def through_a_checkpoint(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@cache
def walk_from_the_start(make: Callable[[], Any], blocks: Any) -> Tensor:
    return walk(FromTorchJD(make(), blocks=blocks), 0, 8)


@stateful
@pytest.mark.parametrize("blocks", ["global", "tensor"])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_the_state_survives_a_checkpoint(make: Callable[[], Any], blocks: Any, steps: int) -> None:
    whole = walk_from_the_start(make, blocks)
    first = FromTorchJD(make(), blocks=blocks)
    walk(first, 0, steps)
    state = first.state_dict()
    saved = through_a_checkpoint(state)
    assert torch.equal(walk(copy.deepcopy(first), steps, 8), whole[steps:])
    assert torch.equal(walk(first, steps, 8), whole[steps:])
    stranger = FromTorchJD(make(), blocks=blocks)
    walk(stranger, 90, 93)  # what it remembers before is forgotten
    for checkpoint in (saved, state, state):  # what was returned and loaded does not change with the steps after that
        for resumed in (FromTorchJD(make(), blocks=blocks), copy.deepcopy(stranger)):
            resumed.load_state_dict(checkpoint)
            assert torch.equal(walk(resumed, steps, 8), whole[steps:])


@stateful
def test_it_is_a_state(make: Callable[[], Any]) -> None:
    """Or the test above would pass without one."""
    assert not torch.equal(walk(FromTorchJD(make()), 4, 8), walk(FromTorchJD(make()), 0, 8)[4:])


@pytest.mark.parametrize(("name", "setting"), [("NashMTL", 1), ("GradVac", 0.7), ("PCD", 0.7), ("CR-MOGM", 0.7)])
def test_settings_stay_what_they_were_built_with(name: str, setting: float) -> None:
    first, other = FromTorchJD(STATEFUL[name]()), FromTorchJD(STATEFUL[name](setting))
    walk(first, 0, 2)
    other.load_state_dict(first.state_dict())
    for part, built in zip(other._states[0].modules(), other.weighting.modules(), strict=True):
        for name in ("update_weights_every", "beta", "alpha"):
            assert getattr(part, name, None) == getattr(built, name, None)


@stateful
def test_blocks_do_not_mix_their_states(make: Callable[[], Any]) -> None:
    both = walk(FromTorchJD(make(), blocks="tensor"), 0, 4)
    alone = FromTorchJD(make(), blocks="tensor")
    for step, answer in enumerate(both):
        torch.manual_seed(step)
        gramian = gramian_of(*torch.randn(2, 2, 5, dtype=torch.float64))[:1]
        torch.testing.assert_close(alone.coefficients(gramian, lr=0.1).values, answer[:1])


@stateful
def test_one_bad_number_stops_the_step_and_is_not_remembered(make: Callable[[], Any]) -> None:
    rule, untouched = FromTorchJD(make()), FromTorchJD(make())
    walk(rule, 0, 2)
    for bad in (math.nan, math.inf):
        gramian = gramian_of(*torch.randn(2, 2, 5, dtype=torch.float64))
        gramian[1, 0, 0] = bad
        for lr in (0.1, torch.tensor([0.1, 0.0])):  # in a block at rest as well
            result = rule.coefficients(gramian, lr=lr)
            assert (result.values == 0).all()
            assert (result.branch == Branch.NOT_FINITE).all()
    walk(untouched, 0, 2)
    assert torch.equal(walk(rule, 2, 4), walk(untouched, 2, 4))


# Wrong use ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [MeanWeighting(), ExcessMTLWeighting(), ExcessMTL(), MoDoWeighting(), GradDrop(), nn.Linear(2, 2), "mgda"]
)
def test_what_does_not_act_on_gramians_is_refused(method: Any) -> None:
    with pytest.raises(HAMUValueError, match="Expected `weighting` to be a TorchJD weighting that acts on Gramians"):
        FromTorchJD(method)
    if isinstance(method, MeanWeighting):
        with pytest.raises(HAMUValueError, match="acts on Gramians, but got a CRMOGMWeighting"):
            FromTorchJD(CRMOGMWeighting(method))


def test_other_settings() -> None:
    with pytest.raises(HAMUValueError, match="Expected `blocks` to be .* but got 'row'"):
        FromTorchJD(UPGrad(), blocks="row")  # type: ignore[arg-type]
    with pytest.raises(HAMUValueError, match="Expected `forget_groups` to be at least 1, but got 0"):
        FromTorchJD(UPGrad(), forget_groups=0)
    with pytest.raises(HAMUValueError, match=r"Expected `gramian` to have shape \[B, 2, 2\]"):
        FromTorchJD(UPGrad()).coefficients(torch.ones(1, 3, 3), lr=0.1)
    assert dataclasses.replace(FromTorchJD(NashMTL(n_tasks=2)), blocks="tensor").blocks == "tensor"


def test_a_weighting_without_an_answer_is_named() -> None:
    rule = FromTorchJD(KrumWeighting(n_byzantine=1))
    with pytest.raises(HAMUStateError, match="Expected KrumWeighting.* to weigh .* but it says: .* at least 4 rows"):
        rule.coefficients(draw_gramian(), lr=0.1)


def test_without_torchjd_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hamu_lightning.solvers._torchjd.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"Expected TorchJD .* Run: pip install 'hamu_lightning\[torchjd\]'"):
        FromTorchJD(UPGrad())


def test_the_state_goes_through_the_optimizers_checkpoint() -> None:
    """Nash-MTL resumed by `hamu_state_dict`: the same weights as in one run."""

    def make() -> tuple[torch.nn.Linear, HAMUOptimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2).double()
        rule = FromTorchJD(NashMTL(n_tasks=2, update_weights_every=3))
        return model, HAMUOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rule)

    def run(model: torch.nn.Linear, optimizer: HAMUOptimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            with optimizer.retain():
                model(x[0]).square().mean().backward()
            with optimizer.forget():
                model(x[1]).sin().mean().backward()
            optimizer.step()

    whole, first, second = make(), make(), make()
    run(*whole, range(5))
    run(*first, range(2))
    buffer = io.BytesIO()
    torch.save([first[0].state_dict(), first[1].hamu_state_dict()], buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    second[0].load_state_dict(weights)
    second[1].load_hamu_state_dict(state)
    run(*second, range(2, 5))
    assert torch.equal(second[0].weight, whole[0].weight)
