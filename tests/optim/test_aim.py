"""The way to a target in a plain loop: the level is followed, the quota resolved, nothing read on the host."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hamu_lightning import HAMUQ, HAMUOptimizer
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.optim import Aim
from hamu_lightning.rules import FixedRadius, TargetQuota


def observe(*losses: float, window: int = 5) -> Aim:
    aim = Aim(window=window)
    for loss in losses:
        aim.observe(torch.tensor(loss))
    return aim


def test_the_level_is_a_mean_that_forgets() -> None:
    assert float(observe(1.0, 3.0, 5.0).level) == pytest.approx(3.0)
    assert float(observe(*[1.0] * 50, 2.0).level) == pytest.approx(1.2)


def test_a_bad_first_loss_is_forgotten() -> None:
    assert float(observe(math.nan, 1.0, 3.0).level) == pytest.approx(1 + 2 / 3)


def test_a_promise_moves_the_level_and_bad_numbers_do_not() -> None:
    aim = observe(1.0, math.nan, math.inf)
    aim.advance(torch.tensor(0.25, dtype=torch.float64))
    aim.advance(torch.tensor(math.nan))
    assert float(aim.level) == 1.25 and aim.taken == 2


def take_steps(optimizer: HAMUOptimizer, weight: torch.Tensor, n: int) -> list[float]:
    """The forget loss is `w0 + w1`, the retain loss `w0^2 / 2`."""
    levels = []
    for _ in range(n):
        with optimizer.forget():
            loss = weight.sum()
            loss.backward()
        optimizer.aim.observe(loss)
        with optimizer.retain():
            (weight[0] ** 2 / 2).backward()
        optimizer.step()
        levels.append(float(weight.detach().sum()))
    return levels


def make(quota: TargetQuota) -> tuple[HAMUOptimizer, torch.Tensor]:
    weight = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
    return HAMUOptimizer(torch.optim.SGD([weight], lr=0.1), HAMUQ(quota, radius=FixedRadius(0.05))), weight


def test_a_target_is_reached_in_its_steps_and_held() -> None:
    optimizer, weight = make(TargetQuota(3.0, steps=40))
    levels = take_steps(optimizer, weight, 60)
    assert levels[19] == pytest.approx(2.0, abs=0.05)  # half of the way, and one step
    assert levels[-1] == pytest.approx(3.0, abs=0.01)
    assert abs(float(weight[0].detach())) < 0.4  # while retain improves


def test_the_state_is_saved() -> None:
    whole, weight = make(TargetQuota(3.0, steps=40))
    expected = take_steps(whole, weight, 12)
    first, weight = make(TargetQuota(3.0, steps=40))
    take_steps(first, weight, 6)
    second, resumed = make(TargetQuota(3.0, steps=40))
    resumed.data.copy_(weight.data)
    second.load_hamu_state_dict(first.hamu_state_dict())
    assert take_steps(second, resumed, 6) == expected[6:]


class CountReads(TorchDispatchMode):
    """Counts what is read on the host."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_on_the_host() -> None:
    optimizer, weight = make(TargetQuota(3.0, steps=40))
    take_steps(optimizer, weight, 1)
    with optimizer.forget():
        (loss := weight.sum()).backward()
    with optimizer.retain():
        (weight[0] ** 2).backward()
    with CountReads() as count:
        optimizer.aim.observe(loss)
        optimizer.step()
    assert count.reads == 0


@pytest.mark.parametrize(
    ("quota", "observes", "message"),
    [
        (TargetQuota(3.0, steps=5), False, "Call `optimizer.aim.observe"),
        (TargetQuota(3.0), True, "TargetQuota\\(2.3, steps=100\\)"),
        (TargetQuota(lambda module: 1.0, steps=5), True, "Expected a number as target"),
    ],
)
def test_what_is_missing_is_named(quota: TargetQuota, observes: bool, message: str) -> None:
    optimizer, weight = make(quota)
    if observes:
        optimizer.aim.observe(torch.tensor(1.0))
    with optimizer.forget():
        weight.sum().backward()
    with optimizer.retain():
        (weight[0] ** 2).backward()
    with pytest.raises(HAMUStateError, match=message):
        optimizer.step()
