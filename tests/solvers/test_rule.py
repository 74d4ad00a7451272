"""`FeasibleDirection` as a rule: settings, quotas, blocks, what is not finite, copies to the host and back."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.rules import HAMUQ, Branch, FixedRadius, RelativeQuota, TargetQuota
from hamu_lightning.solvers import FeasibleDirection, SolveStatus
from hamu_lightning.solvers._backend import Backend
from hamu_lightning.solvers._problem import make_problem, search
from hamu_lightning.solvers._together import run_searches
from tests.solvers.cones import draw_requests

EYE = torch.eye(4, dtype=torch.float64)[None]


# Newton's method alone goes in circles: the step takes three projections by the solver.
HARD = draw_requests(58, 0.1)


@pytest.fixture
def no_newton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver has to find the active sets."""
    monkeypatch.setattr("hamu_lightning.solvers._ball._MOST_REVISIONS", 1)


def make_rule(**settings: Any) -> FeasibleDirection:
    settings = {"floor": {"rare": 0.0}, "radius": FixedRadius(1.0), **settings}
    return FeasibleDirection({"alice": 0.3, "bob": 0.2}, **settings)


def draw_gramians(seed: int, blocks: int, n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(blocks, n, 6, generator=generator, dtype=torch.float64)
    return grads @ grads.mT


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quota": {"alice": -1.0}}, r"Expected `quota\['alice'\]` to be a finite number, not negative"),
        ({"quota": {"alice": float("nan")}}, r"`quota\['alice'\]`"),
        ({"floor": {"rare": float("nan")}}, r"Expected `floor\['rare'\]` to be a finite number"),
        ({"floor": {"alice": 0.0}}, "'alice' in `quota` and in `floor`"),
        ({"quota": {"retain": 0.1}}, "not 'retain', but got 'retain'"),
        ({"quota": {"": 0.1}}, "not empty"),
        ({"floor": {3: 0.1}}, "strings, .* but got 3"),
        ({"quota": {}}, "at least one forget group"),
        ({"radius": 0.1}, "Expected `radius` to be a radius"),
        ({"on_infeasible": "raise"}, "Expected `on_infeasible` to be one of"),
        ({"blocks": "model"}, "Expected `blocks`"),
        ({"solver": "nonesuch"}, r"installed ones, .*osqp.*pip install 'qpsolvers\[nonesuch\]'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        FeasibleDirection(**{"quota": {"alice": 0.1}, **settings})


@pytest.mark.parametrize(
    ("gramian", "known", "message"),
    [
        (EYE[:, :3, :3], {}, r"shape \[B, 4, 4\]"),
        (EYE[0], {}, r"shape \[B, 4, 4\]"),
        (EYE.half(), {}, "float32 or float64"),
        (EYE, {"quota": {"carol": torch.tensor(0.1)}}, "but got 'carol'"),
        (EYE, {"quota": torch.tensor(0.1)}, "2 forget groups"),
        (EYE, {"groups": ("retain", "carol")}, "Expected `groups`"),
        (EYE, {"groups": ("alice", "retain")}, "in this order"),
    ],
)
def test_arguments_are_checked(gramian: Tensor, known: dict[str, Any], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        make_rule().coefficients(gramian, lr=0.1, **known)


def test_groups_and_targets() -> None:
    rule = FeasibleDirection({"alice": TargetQuota(2.0), "bob": 0.1}, {"rare": 0.0})
    assert rule.groups == ("retain", "rare", "alice", "bob")
    assert rule.target_quotas == {"alice": TargetQuota(2.0)}


def test_quota_objects() -> None:
    """A share of the capacity; a target that is capped at 0.9 of it; a tensor for a single group."""
    rule = FeasibleDirection({"alice": RelativeQuota(0.25), "bob": TargetQuota(2.0)}, radius=FixedRadius(2.0))
    step = rule.coefficients(EYE[:, :3, :3], lr=0.1, quota={"bob": torch.tensor(9.0)})
    assert step.group_quota.tolist() == [[0.5, pytest.approx(1.8)]]
    with pytest.raises(HAMUValueError, match="a target needs the forget loss"):
        rule.coefficients(EYE[:, :3, :3], lr=0.1)
    single = FeasibleDirection({"alice": TargetQuota(2.0)}, radius=FixedRadius(1.0))
    assert single.coefficients(EYE[:, :2, :2], lr=0.1, quota=torch.tensor(0.5)).total_quota == 0.5


def test_a_quota_of_minus_infinity_is_no_constraint() -> None:
    given = {name: torch.tensor(-torch.inf) for name in ("alice", "bob")}
    step = make_rule().coefficients(EYE, lr=0.1, quota=given)
    torch.testing.assert_close(step.values, torch.tensor([[-1.0, 0, 0, 0]], dtype=torch.float64))
    assert step.branch.tolist() == [Branch.DIRECT]
    assert step.multipliers["alice"].item() == 0


def test_a_request_that_is_done_leaves_the_problem() -> None:
    names = ("retain", "rare", "bob")
    few = make_rule().coefficients(EYE[:, :3, :3], lr=0.1, groups=names)
    assert few.groups == names
    assert few.improvements["bob"].item() == pytest.approx(0.2)
    assert set(few.multipliers) == {"rare", "bob"}
    none = make_rule().coefficients(EYE[:, :2, :2], lr=0.1, groups=names[:2])
    assert none.forget_improvement == 0
    assert none.retain_improvement == 1


@pytest.mark.parametrize("where", ["gramian", "lr", "quota", "infinite quota"])
def test_what_is_not_finite_moves_nothing(where: str) -> None:
    gramian, lr, given = draw_gramians(0, 2), 0.1, {}
    if where == "gramian":
        gramian[1, 0, 2] = torch.nan
    elif where == "lr":
        lr = float("nan")
    else:
        given = {"alice": torch.tensor(torch.nan if where == "quota" else torch.inf)}
    rule = FeasibleDirection({"alice": 0.1, "bob": 0.1}, {"rare": 0.0})
    step = rule.coefficients(gramian, lr=lr, quota=given)
    assert not step.values.any()
    assert not step.is_finite
    assert step.status.tolist() == [SolveStatus.NOT_FINITE]
    assert step.gramian.isfinite().all()
    assert step.conflict() == ()
    assert step.feasible_improvement == 0


@pytest.mark.parametrize("blocks", ["global", "tensor"])
def test_no_radius_no_step(blocks: Any) -> None:
    step = make_rule(blocks=blocks).coefficients(draw_gramians(0, 2), lr=0.0)
    assert not step.values.any()
    assert (step.status == SolveStatus.NO_RADIUS).all()
    assert (step.branch == Branch.NO_RADIUS).all()


def test_the_learning_rate_radius_is_that_of_the_closed_form() -> None:
    gramian = draw_gramians(0, 1, n=2)
    step = FeasibleDirection({"alice": 0.05}).coefficients(gramian, lr=0.1)
    expected = HAMUQ(0.05, blocks="global").coefficients(gramian, lr=0.1)
    torch.testing.assert_close(step.values, expected.values, rtol=1e-12, atol=0)  # float64, well conditioned
    torch.testing.assert_close(step.radius, expected.radius, rtol=1e-15, atol=0)


def test_skip_rests() -> None:
    rule = make_rule(radius=FixedRadius(0.1))
    assert rule.coefficients(EYE, lr=0.1).values.any()
    skipped = replace(rule, on_infeasible="skip").coefficients(EYE, lr=0.1)
    assert not skipped.values.any()
    assert skipped.status.tolist() == [SolveStatus.INFEASIBLE]
    assert skipped.multipliers["alice"].isnan().all()


def test_blocks_are_solved_like_each_alone() -> None:
    """Quotas are shared by capacity; a floor of 0 stays 0; a floor above is shared likewise."""
    gramian = draw_gramians(1, 5)
    rule = make_rule(blocks="tensor", floor={"rare": 0.2})
    step = rule.coefficients(gramian, lr=0.1)
    capacity = gramian.diagonal(dim1=1, dim2=2).sqrt()[:, 1:]  # R = 1
    shares = torch.tensor([0.2, 0.3, 0.2]).double() * capacity / capacity.sum(dim=0)
    torch.testing.assert_close(step.group_quota, shares)
    torch.testing.assert_close(step.quota, shares[:, 1:].sum(dim=1))
    for block in range(5):
        alone = make_rule(floor={"rare": shares[block, 0].item()}).coefficients(
            gramian[block : block + 1], lr=0.1, quota={"alice": shares[block, 1], "bob": shares[block, 2]}
        )
        torch.testing.assert_close(step.values[block : block + 1], alone.values)
        torch.testing.assert_close(step.multipliers["alice"][block : block + 1], alone.multipliers["alice"])


def test_a_block_without_a_request_s_gradient_is_not_asked() -> None:
    """The other block serves all of it; only if no block has a gradient is the request infeasible."""
    gramian = draw_gramians(3, 2)
    gramian[1, 2], gramian[1, :, 2] = 0, 0
    step = make_rule(blocks="tensor").coefficients(gramian, lr=0.1)
    assert step.group_quota[:, 1].tolist() == [0.3, 0.0]
    assert step.status.tolist() == [SolveStatus.SOLVED] * 2
    assert step.improvements["alice"] >= 0.3 * (1 - 1e-9)  # the tolerance of the optimality conditions
    gramian[0, 2], gramian[0, :, 2] = 0, 0
    assert not make_rule(blocks="tensor").coefficients(gramian, lr=0.1).block_feasible.any()


@pytest.mark.usefixtures("no_newton")
@pytest.mark.parametrize("size", [0.1, 0.6])
def test_together_and_one_by_one_agree(size: float) -> None:
    """One sparse program for all blocks, or one for each: the closed form on the active set is the same."""
    problems = []
    for seed in range(40):
        requests = draw_requests(seed, size)
        shares = np.concatenate((requests.floors, requests.quotas)) / requests.reach[1:]
        problems.append(make_problem(requests.grads @ requests.grads.T, 1.0, shares, len(requests.floors), 1e-10))
    backend = Backend("osqp")
    one, other = (
        run_searches([search(problem, True) for problem in problems], backend, together=together)
        for together in (True, False)
    )
    for a, b in zip(one, other, strict=True):
        assert a.status is b.status
        np.testing.assert_allclose(a.point, b.point, atol=1e-9)  # the tolerance of the optimality conditions


def test_one_problem_for_two_learning_rates() -> None:
    """The blocks that move count as one vector; the one at rest does not count at all."""
    gramian = draw_gramians(2, 3)
    rule = make_rule()
    step = rule.coefficients(gramian, lr=torch.tensor([0.1, 0.0, 0.3]))
    together = rule.in_region(2**0.5).coefficients(gramian[[0, 2]].sum(dim=0, keepdim=True), lr=0.1)
    torch.testing.assert_close(step.values, together.values * torch.tensor([[1.0], [0], [1]]).double())
    assert step.status.shape == (1,)
    assert step.branch.tolist() == [Branch.RECTIFIED, Branch.NO_RADIUS, Branch.RECTIFIED]
    torch.testing.assert_close(step.improvements["alice"], together.improvements["alice"])


@pytest.mark.parametrize("other", ["clarabel", "scs"])
def test_other_solvers_lead_to_the_same_step(other: str) -> None:
    one, two = (HARD.solve(solver=name) for name in ("osqp", other))
    assert one.solutions[0].solves > 1
    assert np.linalg.norm(HARD.step(one) - HARD.step(two)) <= 1e-9 * HARD.radius  # both closed forms


def test_the_solver_alone_finds_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newton's method saves calls of the solver, and changes nothing else."""
    many = [draw_requests(seed, 0.1) for seed in range(60)]
    expected = [requests.solve() for requests in many]
    monkeypatch.setattr("hamu_lightning.solvers._ball._MOST_REVISIONS", 1)
    alone = [requests.solve() for requests in many]
    for requests, one, two in zip(many, expected, alone, strict=True):
        assert one.status.equal(two.status)
        assert np.linalg.norm(requests.step(one) - requests.step(two)) <= 1e-7 * requests.radius
    assert sum(step.solutions[0].solves for step in alone) > sum(step.solutions[0].solves for step in expected)


def test_the_same_numbers_give_the_same_step_bit_by_bit() -> None:
    rule = make_rule()
    first = rule.coefficients(draw_gramians(0, 1), lr=0.1)
    rule.coefficients(draw_gramians(1, 1), lr=0.1)
    assert rule.coefficients(draw_gramians(0, 1), lr=0.1).values.equal(first.values)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_rule_and_result_are_copied(clone: Any) -> None:
    rule = make_rule()
    step = rule.coefficients(draw_gramians(0, 1), lr=0.1)
    assert clone(rule) == rule
    again = clone(step)
    assert again.values.equal(step.values)
    assert again.feasible_improvement == step.feasible_improvement
    stopped = replace(step, values=torch.zeros_like(step.values), branch=torch.full_like(step.branch, 7))
    assert not stopped.is_finite
    assert stopped.improvements["alice"] == 0


def test_a_solver_that_guesses_wrong_costs_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = HARD.step(HARD.solve())

    def guess_nothing(self: Backend, questions: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(20), np.zeros(20)

    monkeypatch.setattr(Backend, "_solve", guess_nothing)
    assert np.linalg.norm(HARD.step(HARD.solve()) - expected) <= 1e-9 * HARD.radius


@pytest.mark.usefixtures("no_newton")
def test_the_guesses_of_the_solver_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of feasible problems, that is; none needs the second method, although all share one sparse program."""
    monkeypatch.setattr("hamu_lightning.solvers._backend.project_exactly", lambda question: None)
    step = make_rule(blocks="tensor").coefficients(draw_gramians(0, 30), lr=0.1)
    assert (step.status == SolveStatus.SOLVED).all()
    assert any(solution.solves > 1 for solution in step.solutions)  # the first one, the shortest step, is not a guess


def test_without_a_proved_answer_there_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backend, "project", lambda self, questions: [None for _ in questions])
    step = HARD.solve()
    assert step.status.tolist() == [SolveStatus.FAILED]
    assert step.solutions[0].point is None
    assert not step.values.any()
    assert not step.block_feasible.any()
    assert step.is_finite
