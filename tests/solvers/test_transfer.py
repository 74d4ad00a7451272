"""Between the device and the host: one copy each way, and nothing else reads the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hamu_lightning.solvers import _rule as rule_module
from hamu_lightning.solvers._transfer import to_device, to_host
from tests.solvers.test_rule import draw_gramians, make_rule


class CopyCounter(TorchDispatchMode):
    """Counts the copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.device != args[0].device:
            self.copies.append((args[0].device.type, result.device.type))
        return result


def test_one_copy_each_way() -> None:
    """On tensors that only pretend to be on an accelerator."""
    cuda = torch.device("cuda", 0)
    with FakeTensorMode(), CopyCounter() as counter:
        inputs = [torch.empty(3, 4, 4, dtype=torch.float64, device=cuda), torch.empty(3, device=cuda), torch.empty(())]
        on_host = to_host(inputs, cuda)
        assert [tensor.device.type for tensor in on_host] == ["cpu"] * 3
        assert [tensor.shape for tensor in on_host] == [tensor.shape for tensor in inputs]
        assert counter.copies == [("cuda", "cpu")]
        on_device = to_device([np.zeros((3, 4)), np.zeros(3)], cuda)
        assert [(tensor.device, tensor.shape) for tensor in on_device] == [(cuda, (3, 4)), (cuda, (3,))]
        assert counter.copies == [("cuda", "cpu"), ("cpu", "cuda")]


def test_packing_keeps_order_and_shape() -> None:
    arrays = [np.arange(6.0).reshape(2, 3), np.zeros((0, 2)), np.array([7.0])]
    cpu = torch.device("cpu")
    for array, tensor in zip(arrays, to_host(to_device(arrays, cpu), cpu), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_nothing_else_reads_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended tensor raises whenever its values are asked for: only the two packed copies may do that."""
    gramian, calls = draw_gramians(0, 3), []

    def copy_in(tensors: Any, device: torch.device) -> list[Tensor]:
        calls.append("to_host")
        return [gramian, *(torch.full(tensor.shape, 0.1, dtype=torch.float64) for tensor in tensors[1:])]

    def copy_out(arrays: Any, device: torch.device) -> list[Tensor]:
        calls.append("to_device")
        return to_device(arrays, torch.device("cpu"))

    monkeypatch.setattr(rule_module, "to_host", copy_in)
    monkeypatch.setattr(rule_module, "to_device", copy_out)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pretended, lr, quota = torch.empty(3, 4, 4), torch.empty(3), torch.empty(())
    step = make_rule(blocks="tensor").coefficients(pretended, lr=lr, quota={"alice": quota})
    assert calls == ["to_host", "to_device"]
    assert isinstance(step.gramian, FakeTensor)
