"""What a step costs in numbers that do not depend on the machine: operators, copies to a device, new containers."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.rules import (
    HAMUQ,
    HAMUU,
    FineTune,
    FixedRadius,
    GradDiff,
    LearningRateRadius,
    NGDiff,
    RelativeRadius,
    Rule,
    TargetQuota,
)

# They touch no memory.
VIEWS = {"view", "select", "transpose", "detach", "unbind", "expand", "unsqueeze", "squeeze", "slice", "lift_fresh"}


class NewOnDevice(TorchFunctionMode):
    """Counts tensors that are made of numbers of the host, on the meta device: no operator shows the copy."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        makes = func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
        is_copy = func is Tensor.new_tensor or (makes and not isinstance(args[0], Tensor))
        self.count += is_copy and result.device.type == "meta"
        return result


class Dispatched(TorchDispatchMode):
    """Counts operators, and among them copies to the meta device or from it, and numbers that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.transfers = 0

    @property
    def passes(self) -> int:
        """How many operators touch memory."""
        return sum(count for name, count in self.operators.items() if name not in VIEWS and "::" not in name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.operators[name] += 1
        devices = {x.device.type for x in (*args, result) if isinstance(x, Tensor)}
        self.transfers += name == "_local_scalar_dense" or (name in ("copy_", "_to_copy") and len(devices) > 1)
        return result


def make(count: int, rule: Rule, device: str) -> tuple[list[nn.Parameter], HAMUOptimizer]:
    weights = [nn.Parameter(torch.ones(3, device=device)) for _ in range(count)]
    optimizer = HAMUOptimizer(SGD(weights, lr=0.1), HAMUQ(0.1, blocks=rule.blocks))
    optimizer.rule = rule  # meta tensors have no norm that could be looked at in the beginning
    return weights, optimizer


def take_step(weights: list[nn.Parameter], optimizer: HAMUOptimizer) -> Dispatched:
    for name in ("retain", "forget"):
        with optimizer.group(name):
            for weight in weights:
                weight.grad = torch.rand_like(weight)
    with Dispatched() as seen, NewOnDevice() as new:
        optimizer.step()
    seen.transfers += new.count
    return seen


@pytest.mark.parametrize(
    "rule",
    [
        HAMUQ(0.01, radius=FixedRadius(0.1)),
        HAMUQ(0.01, radius=RelativeRadius(0.1), blocks="global"),
        HAMUQ(0.01, radius=LearningRateRadius(), allocation="optimal"),
        HAMUQ(TargetQuota(2.0, steps=9)),
        HAMUU(0.01, radius=FixedRadius(0.1)),
        GradDiff(),
        NGDiff(),
        FineTune(),
    ],
    ids=repr,
)
def test_nothing_goes_to_the_device_or_comes_from_it(rule: Rule) -> None:
    """Each such copy waits until the device has done all that it was asked; FakeTensorMode does not see them."""
    weights, optimizer = make(3, rule, "meta")
    for number in range(3):
        optimizer.aim.observe(torch.ones((), device="meta"))
        seen = take_step(weights, optimizer)
        assert number == 0 or seen.transfers == 0
    optimizer.param_groups[0]["lr"] = 0.05
    assert take_step(weights, optimizer).transfers == 1  # the new learning rate, once
    assert take_step(weights, optimizer).transfers == 0


def test_the_counter_sees_copies() -> None:
    with Dispatched() as seen, NewOnDevice() as new:
        made = torch.tensor([1.0], device="meta")
        made.new_tensor([2.0])
        torch.ones(2).to("meta")
        torch.ones(2, device="meta").copy_(torch.ones(2))
        torch.tensor([1.0])
        torch.as_tensor(made)
        torch.ones(()).item()
    assert (seen.transfers, new.count) == (3, 2)


def test_small_tensors_cost_no_operator_each() -> None:
    """In host memory they are multiplied side by side, and moved by one call over all of them."""
    rule = HAMUQ(0.01, radius=FixedRadius(0.1), blocks="global")
    found = []
    for count in (20, 200):
        weights, optimizer = make(count, rule, "cpu")
        take_step(weights, optimizer)
        found.append(take_step(weights, optimizer).passes)
    assert found[0] == found[1] <= 180


def test_containers_do_not_pile_up() -> None:
    """Containers made and kept at each step let the garbage collector run, which walks over everything there is."""
    weights, optimizer = make(200, HAMUQ(0.01, radius=FixedRadius(0.1)), "cpu")
    for _ in range(3):
        take_step(weights, optimizer)
    gc.collect()
    gc.disable()
    try:
        before = gc.get_count()[0]
        for name in ("retain", "forget"):
            with optimizer.group(name):
                for weight in weights:
                    weight.grad = torch.rand_like(weight)
        middle = gc.get_count()[0]
        optimizer.step()
        after = gc.get_count()[0]
    finally:
        gc.enable()
    assert middle - before >= 0
    assert after - middle <= 100
