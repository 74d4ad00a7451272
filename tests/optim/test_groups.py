"""Several groups in the wrapper: each gradient in its own slot, one step for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.rules import HAMUQ, FixedRadius, TargetQuota
from hamu_lightning.solvers import FeasibleDirection

NAMES = ("retain", "rare", "a", "b")
RULE = FeasibleDirection({"a": 0.02, "b": 0.01}, {"rare": 0.0}, radius=FixedRadius(0.1))


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def loss_of(model: nn.Module, name: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + NAMES.index(name))
    dtype = next(model.parameters()).dtype
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64).to(dtype)
    return nn.functional.cross_entropy(model(x), torch.randint(3, (16,), generator=generator))


def gradient_of(model: nn.Module, name: str, seed: int = 0) -> Tensor:
    grads = torch.autograd.grad(loss_of(model, name, seed), list(model.parameters()))
    return torch.cat([g.flatten() for g in grads]).double()


def fill(optimizer: HAMUOptimizer, model: nn.Module, names: Sequence[str] = NAMES, seed: int = 0) -> None:
    optimizer.zero_grad()
    for name in names:
        with optimizer.group(name):
            loss_of(model, name, seed).backward()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:The weights are (bfloat16|float16)")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_weights_move_by_the_step(dtype: torch.dtype) -> None:
    """And the step keeps all its promises on the actual gradients."""
    model = make_model(dtype)
    grads = {name: gradient_of(model, name) for name in NAMES}
    before = flat(model)
    optimizer = HAMUOptimizer(SGD(model.parameters(), lr=0.1), RULE)
    fill(optimizer, model)
    optimizer.step()
    moved = flat(model) - before
    assert optimizer.last_step is not None
    values = optimizer.last_step.coefficients.values[0]
    expected = sum(value * grads[name] for value, name in zip(values, NAMES, strict=True))
    # Each weight is rounded once after the step, the gradients once before it.
    torch.testing.assert_close(moved, expected, rtol=0, atol=float(2 * torch.finfo(dtype).eps * before.abs().max()))
    if dtype is torch.float64:
        assert float(grads["a"] @ moved) >= 0.02 * (1 - 1e-9)
        assert float(grads["b"] @ moved) >= 0.01 * (1 - 1e-9)
        assert float(grads["rare"] @ moved) <= 1e-12
        assert float(moved.norm()) <= 0.1 * (1 + 1e-9)


def test_one_request_is_hamu_q() -> None:
    """The same steps as the closed form, on the whole model."""
    models = [make_model(), make_model()]
    radius = FixedRadius(0.1)
    rules = FeasibleDirection({"forget": 0.02}, radius=radius), HAMUQ(0.02, radius=radius, blocks="global")
    for model, rule in zip(models, rules, strict=True):
        optimizer = HAMUOptimizer(SGD(model.parameters(), lr=0.1), rule)
        for seed in range(3):
            optimizer.zero_grad()
            with optimizer.retain():
                loss_of(model, "retain", seed).backward()
            with optimizer.forget():
                loss_of(model, "a", seed).backward()
            optimizer.step()
    torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=0, atol=1e-7)  # 1e-6 of the radius, three steps


def test_a_missing_group_is_named() -> None:
    model = make_model()
    optimizer = HAMUOptimizer(SGD(model.parameters(), lr=0.1), RULE)
    before = flat(model)
    fill(optimizer, model, ("retain", "a"))
    with pytest.raises(
        HAMUStateError, match=r"but the rare and b gradients are missing.*`with optimizer.group\(name\):`"
    ):
        optimizer.step()
    with (
        pytest.raises(HAMUValueError, match=r"Expected one of the rule's groups .* but got 'forget'"),
        optimizer.forget(),
    ):
        pass
    assert torch.equal(before, flat(model))


def test_a_step_of_some_of_the_groups() -> None:
    model = make_model()
    optimizer = HAMUOptimizer(SGD(model.parameters(), lr=0.1), RULE)
    fill(optimizer, model, ("retain", "b"))
    optimizer.plan_step(groups=("retain", "b"))
    optimizer.step()
    assert optimizer.last_step is not None
    assert optimizer.last_step.coefficients.groups == ("retain", "b")
    assert float(optimizer.last_step.coefficients.improvements["b"]) >= 0.01 * (1 - 1e-9)
    fill(optimizer, model)
    optimizer.step()  # all of them again
    assert optimizer.last_step.coefficients.groups == NAMES


def test_groups_are_reused() -> None:
    """The Gramian holds the last gradient of a group that has no new one, and the step moves along it."""
    model = make_model()
    optimizer = HAMUOptimizer(SGD(model.parameters(), lr=0.1), RULE, reuse_groups=True)
    fill(optimizer, model)
    old = {name: gradient_of(model, name) for name in NAMES}
    optimizer.step()
    before, new = flat(model), {name: gradient_of(model, name, 1) for name in ("retain", "a")}
    fill(optimizer, model, ("retain", "a"), seed=1)
    optimizer.step()
    assert optimizer.last_step is not None
    rows = torch.stack([new["retain"], old["rare"], new["a"], old["b"]])
    torch.testing.assert_close(optimizer.last_step.gramian.sum(dim=0), rows @ rows.T)
    torch.testing.assert_close(flat(model) - before, optimizer.last_step.coefficients.values[0] @ rows)
    fill(optimizer, model, ("retain",), seed=2)
    with pytest.raises(HAMUStateError, match="are missing"):  # nothing to forget is new
        optimizer.step()


def test_shares_of_reused_gradients_are_their_own() -> None:
    """A gradient from a short window counts as the mean that it is a share of, in later steps as well."""
    model = make_model()
    optimizer = HAMUOptimizer(SGD(model.parameters(), lr=0.1), RULE, reuse_groups=True)
    fill(optimizer, model)
    optimizer.plan_step(window_shares=(1.0, 0.5))
    optimizer.step()
    assert optimizer.last_step is not None
    first = optimizer.last_step.gramian.sum(dim=0)
    new = gradient_of(model, "a", 1)
    fill(optimizer, model, ("retain", "a"), seed=1)
    optimizer.step()
    second = optimizer.last_step.gramian.sum(dim=0)
    assert float(second[3, 3]) == pytest.approx(float(first[3, 3]), rel=1e-12)
    assert float(second[2, 2]) == pytest.approx(float(new @ new), rel=1e-12)


def test_actual_changes_of_all_groups() -> None:
    model = make_model()
    optimizer = HAMUOptimizer(SGD(model.parameters(), lr=0.1), RULE, track_actual=True)
    grads = {name: gradient_of(model, name) for name in NAMES}
    before = flat(model)
    fill(optimizer, model)
    optimizer.step()
    moved = flat(model) - before
    assert optimizer.last_step is not None and optimizer.last_step.actual_improvements is not None
    signs = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    expected = signs * torch.stack([grads[name] @ moved for name in NAMES])
    torch.testing.assert_close(optimizer.last_step.actual_improvements, expected)
    assert "actual_rare_improvement" in optimizer.last_step.summary()


def test_targets_of_several_groups() -> None:
    """Each is followed on its own, and the state of all is saved."""
    rule = FeasibleDirection({"a": TargetQuota(2.0, steps=50), "b": 0.001}, {"rare": 0.0}, radius=FixedRadius(0.1))
    model = make_model()
    optimizer = HAMUOptimizer(SGD(model.parameters(), lr=0.1), rule)
    loss = float(loss_of(model, "a").detach())
    for _ in range(2):
        fill(optimizer, model)
        optimizer.aim_of("a").observe(loss_of(model, "a"))
        optimizer.step()
    assert optimizer.last_step is not None
    asked = float(optimizer.last_step.coefficients.group_quota[0, 1])  # type: ignore[attr-defined]
    level = float(optimizer.aim_of("a").level) - float(optimizer.last_step.improvement("a"))
    assert asked == pytest.approx((2.0 - level) / 49, rel=1e-9) and level > loss
    other: Any = HAMUOptimizer(SGD(make_model().parameters(), lr=0.1), rule)
    other.load_hamu_state_dict(optimizer.hamu_state_dict())
    assert float(other.aim_of("a").level) == float(optimizer.aim_of("a").level) and other.aim_of("a").taken == 2


def test_a_rule_with_other_groups_takes_over() -> None:
    model = make_model()
    optimizer = HAMUOptimizer(SGD(model.parameters(), lr=0.1), RULE, reuse_groups=True)
    fill(optimizer, model)
    optimizer.step()
    optimizer.rule = FeasibleDirection({"b": 0.01}, radius=FixedRadius(0.1))
    fill(optimizer, model, ("retain", "b"))
    optimizer.step()
    assert optimizer.last_step is not None and optimizer.last_step.coefficients.groups == ("retain", "b")
    assert set(optimizer._core.slots) == {"b"}


def test_a_scaler_unscales_every_slot() -> None:
    model, reference = make_model(torch.float32), make_model(torch.float32)
    optimizer, scaler = HAMUOptimizer(SGD(model.parameters(), lr=0.1), RULE), torch.amp.GradScaler("cpu", init_scale=64)
    for name in NAMES:
        with optimizer.group(name):
            scaler.scale(loss_of(model, name)).backward()
    scaler.unscale_(optimizer)
    optimizer.unscale_forget_(scaler)
    scaler.step(optimizer)
    scaler.update()
    plain = HAMUOptimizer(SGD(reference.parameters(), lr=0.1), RULE)
    fill(plain, reference)
    plain.step()
    torch.testing.assert_close(flat(model), flat(reference), rtol=0, atol=1e-6)  # float32


def test_an_overflow_of_any_group_leaves_the_step_out() -> None:
    model = make_model(torch.float32)
    optimizer, scaler = HAMUOptimizer(SGD(model.parameters(), lr=0.1), RULE), torch.amp.GradScaler("cpu", init_scale=64)
    before = flat(model)
    for name in NAMES:
        with optimizer.group(name):
            scaler.scale(loss_of(model, name) * (torch.inf if name == "b" else 1)).backward()
    scaler.unscale_(optimizer)
    optimizer.unscale_forget_(scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32 and torch.equal(before, flat(model))
