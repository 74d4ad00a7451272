"""Snapshots: what is put back is what was there, for every optimizer that can be wrapped."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.optim._trial import Snapshot
from tests.optim.doors import RULE, make_model
from tests.optim.doors import take_step as take_combined_step

OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9, "nesterov": True}, "RMSprop": {"momentum": 0.9}}
# LBFGS cannot be wrapped, and SparseAdam takes no dense gradients.
KINDS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind not in (Optimizer, LBFGS, SparseAdam)
}


def take_step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(10 * seed + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("past", [0, 2])
def test_everything_is_put_back(name: str, past: int) -> None:
    """Bit by bit, and as often as asked: the same step from there ends at the same weights and state."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    if name == "Muon":  # for matrices only
        model.register_parameter("bias", None)
    optimizer = KINDS[name](model.parameters(), lr=0.01, **OPTIONS.get(name, {}))
    for seed in range(past):
        take_step(model, optimizer, seed)
    before, snapshot = (
        copy.deepcopy((model.state_dict(), optimizer.state_dict())),
        Snapshot(optimizer, [*model.parameters()]),
    )
    ends = []
    for _ in range(2):
        take_step(model, optimizer, seed=7)
        ends.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
        snapshot.restore()
        torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


class Fails:
    """Judges each step, and fails at the third."""

    is_due, region = True, 1.0

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def judge(self, report: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return "accept"


@pytest.mark.filterwarnings("ignore:The base optimizer")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError(), OSError("no space")])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_failure_leaves_what_was_judged_last(error: BaseException, base: Any) -> None:
    model = make_model()
    optimizer = HAMUOptimizer(base(model.parameters(), lr=0.1), RULE)
    optimizer.referee = Fails(error)
    for seed in range(2):
        take_combined_step(optimizer, model, seed)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    memory = [value.data_ptr() for state in optimizer.state.values() for value in state.values()]
    with pytest.raises(type(error)):
        take_combined_step(optimizer, model, 2)
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    assert [value.data_ptr() for state in optimizer.state.values() for value in state.values()] == memory
    assert (int(optimizer.applied_steps), optimizer.undone_steps) == (2, 1)
