"""What must hold whatever the solver does: invariances, prices, decompositions, bounds, named conflicts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hamu_lightning.rules import FixedRadius, RelativeRadius
from hamu_lightning.solvers import FeasibleDirection, SolveStatus
from tests.oracles import draw_joint_problem, solve_certificate
from tests.solvers.cones import Requests, draw_requests

seeds = pytest.mark.parametrize("seed", range(20))
# Gramians are rounded to 1e-16, and angles between random gradients of a dozen groups come down to 1e-2 or so.
CLOSE = 1e-9


def assert_same_step(requests: Requests, one: np.ndarray, other: np.ndarray) -> None:
    assert np.linalg.norm(one - other) <= CLOSE * requests.radius


@seeds
@pytest.mark.parametrize("size", [0.1, 0.6])
def test_the_order_of_requests_does_not_matter(seed: int, size: float) -> None:
    requests = draw_requests(seed, size)
    p, q = len(requests.floors), len(requests.quotas)
    order = np.concatenate((np.random.default_rng(seed).permutation(p), p + np.random.default_rng(seed).permutation(q)))
    turned = replace(
        requests,
        grads=requests.grads[np.append(0, 1 + order)],
        floors=requests.floors[order[:p]],
        quotas=requests.quotas[order[p:] - p],
    )
    assert_same_step(requests, requests.step(requests.solve()), turned.step(turned.solve()))


@seeds
@pytest.mark.parametrize("size", [0.1, 0.6])
def test_rescaling_a_gradient_with_its_quota_changes_nothing(seed: int, size: float) -> None:
    """Also in best effort: violations are measured in shares. A common factor is a change of the loss's unit."""
    requests = draw_requests(seed, size)
    factors = 10 ** np.random.default_rng(seed).uniform(-6, 6, len(requests.grads))
    p = len(requests.floors)
    scaled = replace(
        requests,
        grads=requests.grads * factors[:, None],
        floors=requests.floors * factors[1 : 1 + p],
        quotas=requests.quotas * factors[1 + p :],
    )
    assert_same_step(requests, requests.step(requests.solve()), scaled.step(scaled.solve()))


@seeds
def test_an_orthogonal_change_of_basis_turns_the_step(seed: int) -> None:
    requests = draw_requests(seed, 0.3)
    dimension = requests.grads.shape[1]
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(dimension, dimension)))[0]
    turned = replace(requests, grads=requests.grads @ turn)
    assert_same_step(requests, requests.step(requests.solve()) @ turn, turned.step(turned.solve()))


@seeds
def test_a_repeated_request_changes_nothing(seed: int) -> None:
    requests = draw_requests(seed, 0.1)
    twice = replace(
        requests,
        grads=np.vstack((requests.grads, 3 * requests.grads[-1:])),
        quotas=np.append(requests.quotas, 3 * requests.quotas[-1]),
    )
    one, other = requests.solve(), twice.solve()
    assert one.status == other.status
    if one.status != SolveStatus.INFEASIBLE:  # the same violation counts twice
        assert_same_step(requests, requests.step(one), twice.step(other))


@seeds
def test_multipliers_are_prices(seed: int) -> None:
    """Finite differences of the optimum in each quota and floor."""
    requests = draw_requests(seed, 0.1)
    result = requests.solve()
    if not bool(result.block_feasible.all()):  # there is no price
        assert all(bool(price.isnan().all()) for price in result.multipliers.values())
        return
    p = len(requests.floors)
    for index, name in enumerate(requests.names[1:]):
        step = 1e-6 * requests.reach[1 + index]
        changes = []
        for change in (-step, step):
            floors, quotas = requests.floors.copy(), requests.quotas.copy()
            (floors if index < p else quotas)[index if index < p else index - p] += change
            if (floors < 0).any():
                continue
            changes.append((change, -replace(requests, floors=floors, quotas=quotas).solve().retain_improvement.item()))
        changes.append((0.0, -result.retain_improvement.item()))
        (low, below), (high, above) = min(changes), max(changes)
        # The curvature of the optimum, 1e-6 of the capacity away, on problems that are not close to infeasible.
        unit = requests.reach[0] / requests.reach[1 + index]
        price = result.multipliers[name].item()
        assert price >= 0
        assert (above - below) / (high - low) == pytest.approx(price, abs=1e-3 * unit, rel=1e-3)


@seeds
def test_costs_sum_to_the_multiplier(seed: int) -> None:
    requests = draw_requests(seed, 0.1)
    result = requests.solve()
    p = len(requests.floors)
    assert result.costs.shape == (1, p, len(requests.quotas))
    for j, name in enumerate(requests.names[1 : 1 + p]):
        multiplier = result.multipliers[name].item()
        total = (result.costs[0, j].sum() + result.retain_costs[0, j]).item()
        # Two ways to solve the same small system.
        unit = requests.reach[0] / requests.reach[1 + j]
        assert total == pytest.approx(multiplier, abs=1e-7 * unit, nan_ok=True)


def test_the_cost_of_protection_is_charged_to_the_request_that_causes_it() -> None:
    """Alice's gradient is along the protected one, Bob's is orthogonal to it: only Alice makes protection expensive."""
    grads = np.array([[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.8, 0.6, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    result = Requests(grads, np.array([0.0]), np.array([0.3, 0.3]), 1.0).solve()
    alice, bob = result.costs[0, 0].tolist()
    assert alice > 0.1
    assert bob == pytest.approx(0, abs=1e-12)  # rounding
    assert result.retain_costs[0, 0].item() == pytest.approx(0, abs=1e-12)


@seeds
def test_the_joint_bound_is_sharp(seed: int) -> None:
    """Quotas at 0.999 of the bound can be served without harm to retain; at 1.001 they cannot."""
    requests = draw_requests(seed, 0.1)
    bound = requests.solve().feasible_improvement.item()
    theta = bound / requests.quotas.sum()
    if theta == 0:  # the floors alone are too much for retain
        alone = replace(requests, quotas=0 * requests.quotas).solve()
        assert not bool(alone.block_feasible.all()) or alone.retain_improvement < 0
        return
    for factor, is_harmless in ((0.999, True), (1.001, False)):
        result = replace(requests, quotas=factor * theta * requests.quotas).solve()
        harmless = bool(result.block_feasible.all()) and result.retain_improvement >= -CLOSE * requests.reach[0]
        assert harmless == is_harmless


@seeds
def test_the_joint_bound_of_several_blocks(seed: int) -> None:
    """One request: the certificate of docs/method.md#certificates, eq. 6.4, which a cone solver confirms."""
    problem = draw_joint_problem(2 * seed, blocks=2 + seed % 7)
    rule = FeasibleDirection({"alice": 0.01}, radius=RelativeRadius(1.0, floor=0.0), blocks="tensor")
    sizes = torch.tensor([g.size for g in problem.retain])
    gramian, norms = torch.from_numpy(problem.gramian), torch.from_numpy(problem.radii)
    result = rule.coefficients(gramian, lr=0.1, weight_norms=norms, sizes=sizes)
    expected = solve_certificate(problem)
    # Every point of the dual is an upper bound; the search for the least one ends within 1e-5 of the capacity.
    assert result.feasible_improvement.item() == pytest.approx(expected, abs=1e-5 * problem.forget_reach, rel=0)


EYE = np.eye(4)


@pytest.mark.parametrize(
    ("grads", "floors", "quotas", "expected"),
    [
        (EYE, [0.0], [0.5, 0.5], ()),
        (EYE, [0.0], [1.5, 0.5], ("f0",)),  # beyond its capacity
        (EYE, [0.9], [0.9, 0.0], ("p0",)),  # one of two, the first
        (EYE[[0, 1, 1, 2]], [0.0], [0.5, 0.5], ("p0",)),  # protected and forgotten are the same
        (EYE[[0, 1, 2, 3]], [0.0], [1.5, 1.5], ("f0", "f1")),
        (EYE * [[1], [1], [0], [1]], [0.0], [0.1, 0.1], ("f0",)),  # a request without gradient
    ],
)
def test_conflicts_are_named(grads: np.ndarray, floors: list[float], quotas: list[float], expected: tuple) -> None:
    requests = Requests(np.asarray(grads, float), np.array(floors), np.array(quotas), 1.0)
    result = requests.solve()
    assert result.conflict() == expected
    assert bool(result.block_feasible.all()) == (expected == ())


def test_a_large_conflict_has_none_to_spare() -> None:
    requests = Requests(np.eye(7), np.zeros(0), np.full(6, 1.5), 1.0)
    assert requests.solve().conflict() == tuple(f"f{i}" for i in range(6))


def test_protected_and_forgotten_gradients_that_are_equal_leave_retain_its_share() -> None:
    """The constraints contradict each other at any radius: the violation is least along them, the rest is retain's."""
    requests = Requests(EYE[[0, 1, 1]], np.zeros(1), np.array([0.5]), 2.0)
    result = requests.solve()
    assert result.status == SolveStatus.INFEASIBLE
    np.testing.assert_allclose(requests.step(result), [-2.0, 0, 0, 0], atol=CLOSE)


def test_retain_bounded_by_the_constraints_leaves_the_radius_slack() -> None:
    requests = Requests(EYE[[0, 0]] * [[1.0], [2.0]], np.zeros(0), np.array([0.5]), 1.0)
    result = requests.solve()
    assert result.status == SolveStatus.SLACK_RADIUS
    np.testing.assert_allclose(requests.step(result), [0.25, 0, 0, 0], atol=CLOSE)
    assert result.multipliers["f0"].item() == pytest.approx(0.5)


@seeds
def test_a_remainder_that_is_rounding_is_not_followed(seed: int) -> None:
    """Retain lies in the plane of two requests. What is left of it there is 1e-17, in a direction without meaning."""
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0]
    grads = np.array([[0.6, 0.8, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]) @ turn
    requests = Requests(grads, np.zeros(0), np.array([0.3, 0.3, -0.9]), 1.0)
    result = requests.solve()
    assert result.status == SolveStatus.SLACK_RADIUS
    np.testing.assert_allclose(turn @ requests.step(result), [0.3, 0.3, 0, 0], atol=CLOSE)


@pytest.mark.parametrize("others", [[0.3], []])
def test_a_request_without_gradient_rests_only_if_it_is_alone(others: list[float]) -> None:
    grads = np.vstack((EYE[0], 0 * EYE[0], EYE[1 : 1 + len(others)]))
    requests = Requests(grads, np.zeros(0), np.array([0.1, *others]), 1.0)
    result = requests.solve()
    assert result.status == SolveStatus.INFEASIBLE
    assert bool(result.values.any()) == bool(others)
    if others:
        assert result.improvements["f1"].item() == pytest.approx(0.3)


def test_floors_come_before_quotas() -> None:
    """A floor at the whole radius and a request across it: nothing is left for the request."""
    requests = Requests(EYE[:3], np.array([1.0]), np.array([0.5]), 1.0)
    np.testing.assert_allclose(requests.step(requests.solve()), [0, -1.0, 0, 0], atol=1e-6)  # the root of CLOSE


def test_constraints_that_need_the_whole_radius_have_no_finite_price() -> None:
    requests = Requests(EYE[:3], np.array([0.6]), np.array([0.8]), 1.0)
    result = requests.solve()
    np.testing.assert_allclose(requests.step(result), [0, -0.6, 0.8, 0], atol=1e-7)  # the root of a rounding
    assert bool(result.block_feasible.all())
    exact = Requests(EYE[:3], np.array([0.0]), np.array([1.0]), 1.0).solve()
    assert exact.multipliers["f0"].item() == np.inf
    assert exact.costs.isnan().all()


def test_fixed_radius_of_blocks_adds_up_globally() -> None:
    rule = FeasibleDirection({"alice": 0.0}, radius=FixedRadius(3.0))
    gramian = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    step = rule.coefficients(gramian, lr=torch.tensor([0.1, 0.2]))
    assert step.retain_improvement.item() == pytest.approx(np.sqrt(2) * np.sqrt(18))
    step = rule.coefficients(gramian, lr=torch.tensor([0.1, 0.0]))
    assert step.retain_improvement.item() == pytest.approx(3.0)
    assert not step.values[1].any()


@seeds
def test_residuals_are_those_of_the_optimality_conditions(seed: int) -> None:
    """Recomputed on the actual gradients, in shares of the radius and of the gradients' lengths."""
    requests = draw_requests(seed, 0.1)
    result = requests.solve()
    (solution,) = result.solutions
    if solution.multipliers is None:
        assert np.isnan(solution.residual)
        return
    step = requests.step(result) / requests.radius
    units = requests.grads / np.linalg.norm(requests.grads, axis=1, keepdims=True)
    signs = np.where(np.arange(len(units)) > len(requests.floors), 1.0, -1.0)
    bounds = np.append(requests.floors, requests.quotas) / requests.reach[1:]
    slack = (signs[:, None] * units)[1:] @ step - bounds
    worst = max(np.linalg.norm(step) - 1, *-slack, *slack[result.solutions[0].multipliers > 0])
    assert 0 <= solution.residual <= 1e-9
    assert worst <= solution.residual + 1e-12  # rounding
