"""The wrapper is an optimizer: schedulers, closures, checkpoints and copies, and bases that it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.rules import HAMUQ, RelativeRadius
from tests.optim.doors import BASES, RULE, Wrap, make_losses, make_model, take_step, weights, wrap_directly


def test_zero_grad_keeps_the_forget_gradient(wrap: Wrap) -> None:
    model = make_model()
    optimizer = wrap(model)
    with optimizer.forget():
        make_losses(model)[1].backward()
    optimizer.zero_grad()
    assert optimizer.has_forget_gradient
    assert all(p.grad is None for p in model.parameters())


def test_each_group_uses_its_own_learning_rate() -> None:
    model = make_model(torch.float64)
    first, second = model[0], model[2]
    base = SGD([{"params": first.parameters(), "lr": 0.0}, {"params": second.parameters(), "lr": 0.3}])
    before = weights(model)
    take_step(HAMUOptimizer(base, HAMUQ(1e-4, blocks="global"), model.named_parameters()), model)
    assert torch.equal(before[0], first.weight)
    assert not torch.equal(before[2], second.weight)


@pytest.mark.parametrize("target", ["wrapper", "base"])
def test_schedules_change_the_radius_not_the_direction(wrap: Wrap, target: str) -> None:
    """The schedule reaches the rule, through the wrapper or the base, also after loading a state."""
    model = make_model()
    optimizer = wrap(model, HAMUQ(0.0))
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer if target == "wrapper" else optimizer.base, 1, gamma=0.1)
    take_step(optimizer, model)
    first = optimizer.last_step
    scheduler.step()
    take_step(optimizer, model)
    assert first is not None and optimizer.last_step is not None
    torch.testing.assert_close(optimizer.last_step.lr, first.lr * 0.1)
    assert optimizer.base.param_groups is optimizer.param_groups


def test_plateau_scheduler_and_step_hooks(wrap: Wrap) -> None:
    model = make_model()
    optimizer = wrap(model)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.base.register_step_post_hook(lambda *_: calls.append("base"))
    take_step(optimizer, model)
    assert calls == ["pre", "base", "post"]
    for _ in range(3):
        scheduler.step(1.0)
    assert optimizer.base.param_groups[0]["lr"] < 0.1


def test_step_returns_what_the_closure_returns(wrap: Wrap) -> None:
    model = make_model()
    optimizer = wrap(model)
    with optimizer.forget():
        make_losses(model)[1].backward()

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = make_losses(model)[0]
        loss.backward()
        return loss

    assert optimizer.step(closure).detach() == make_losses(make_model())[0].detach()


@pytest.mark.parametrize("base", BASES)
def test_state_dict_is_the_bases_and_loads_both_ways(wrap: Wrap, base: str) -> None:
    model, other = make_model(), make_model()
    optimizer, plain = wrap(model, base=base), BASES[base](other.parameters())
    take_step(optimizer, model)
    plain.load_state_dict(optimizer.state_dict())
    again = wrap(other, base=base)
    again.load_state_dict(plain.state_dict())
    assert str(again.state_dict()) == str(optimizer.state_dict())
    again.load_hamu_state_dict(optimizer.hamu_state_dict())
    assert again.steps == 1


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_independent_and_work(copier: Callable[[object], tuple[nn.Module, HAMUOptimizer]]) -> None:
    model = make_model()
    optimizer = wrap_directly(model, base="momentum")
    take_step(optimizer, model)
    twin, twin_optimizer = copier((model, optimizer))
    take_step(twin_optimizer, twin, seed=3)
    take_step(optimizer, model, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert twin_optimizer.steps == optimizer.steps == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.LBFGS(p), "but got LBFGS, which evaluates its closure several times"),
        (lambda p: SGD(p, lr=0.1, maximize=True), "Expected `maximize=False`"),
        (lambda p: HAMUOptimizer(SGD(p, lr=0.1), RULE), "but got a HAMUOptimizer: wrap it once"),
        (lambda p: "sgd", "Expected `base` to be a torch.optim.Optimizer, but got str"),
    ],
)
def test_refused_bases(make: Callable[[Iterator[Tensor]], Optimizer], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        HAMUOptimizer(make(make_model().parameters()), RULE)


def test_refused_groups() -> None:
    optimizer = HAMUOptimizer(SGD(make_model().parameters(), lr=0.1), RULE)
    with pytest.raises(HAMUValueError, match="Expected `maximize=False`"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "maximize": True})
    assert len(optimizer.param_groups) == 1


def test_refused_rules_and_weights() -> None:
    model = make_model()
    with pytest.raises(HAMUValueError, match="Expected `rule` to be a rule such as HAMUQ"):
        HAMUOptimizer(SGD(model.parameters(), lr=0.1), 0.1)  # type: ignore[arg-type]
    with pytest.raises(HAMUValueError, match="Expected the names of all parameters with `blocks='layer'`"):
        HAMUOptimizer(SGD(model.parameters(), lr=0.1), HAMUQ(0.1, blocks="layer"))
    layered = HAMUOptimizer(SGD(model.named_parameters(), lr=0.1), HAMUQ(0.1, blocks="layer"))
    take_step(layered, model)
    assert layered.last_step is not None and layered.last_step.labels == ("0", "2")
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.raises(HAMUValueError, match="Expected some weight to differ from zero"):
        HAMUOptimizer(SGD(model.parameters(), lr=0.1), HAMUQ(0.1, radius=RelativeRadius(0.1)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(HAMUValueError, match="at least one parameter that requires grad"):
        HAMUOptimizer(SGD(model.parameters(), lr=0.1), RULE)


def test_distributed_state_dict_initialises_the_base(wrap: Wrap) -> None:
    """torch.distributed.checkpoint takes one step at lr 0 to make the state; it must be no error and no movement."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = make_model()
    optimizer, before = wrap(model, base="adamw"), weights(model)
    state = get_optimizer_state_dict(model, optimizer)
    assert "0.weight" in state["state"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
