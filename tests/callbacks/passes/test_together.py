"""The guard walks over a module once; then it looks at the same objects, and notices where there are others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hamu_lightning.callbacks.passes._guard import ModuleGuard


class Holder(nn.Module):
    """Buffers, a frozen parameter, and what else hangs on modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(3))
        self.register_buffer("large", torch.zeros(70_000))
        self.count, self.history, self.seen = 0, [1, 2], {"a": torch.zeros(2)}


def state(module: Holder) -> list[Any]:
    buffers = [(name, tensor.tolist()) for name, tensor in module.named_buffers() if tensor.numel() < 100]
    seen = {name: tensor.tolist() for name, tensor in module.seen.items()}
    return [buffers, module.count, list(module.history), seen, [*vars(module)], [*dict(module.named_modules())]]


def settled(module: nn.Module) -> ModuleGuard:
    """Past the looks at the first windows, and past one pass more."""
    guard = ModuleGuard(module)
    for _ in range(4):
        with guard.guarding():
            pass
        guard.end_window()
    return guard


def write_through_data(module: Holder) -> None:
    """No version counter shows it."""
    module.get_buffer("layers.1.1.running_mean").data.add_(1)
    module.seen["a"].data.fill_(3)


def rebind(module: Holder) -> None:
    module.count += 1
    module.seen["a"] = torch.ones(2)
    module.layers[0][1].running_var = torch.full((3,), 7.0)


def grow(module: Holder) -> None:
    module.history.append(3)
    module.extra = [4]  # type: ignore[assignment]
    module.seen["b"] = torch.ones(2)


def swap_memory(module: Holder) -> None:
    module.get_buffer("layers.2.1.running_var").data = torch.full((3,), 5.0)


CHANGES: list[Callable[[Holder], None]] = [write_through_data, rebind, grow, swap_memory]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_pass_changes_is_put_back(change: Callable[[Holder], None]) -> None:
    module = Holder()
    guard = settled(module)
    before = state(module)
    for _ in range(2):
        with guard.guarding():
            change(module)
        assert state(module) == before


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_passes_stays(change: Callable[[Holder], None]) -> None:
    """The retain pass owns the module."""
    module = Holder()
    guard = settled(module)
    change(module)
    before = state(module)
    for other in (write_through_data, rebind):
        with guard.guarding():
            other(module)
        assert state(module) == before


def test_it_walks_once() -> None:
    """Constants and contents may change; another object is looked at, with all that hangs on it."""
    module = Holder()
    guard = settled(module)
    walks = guard.walks
    for number in range(3):
        module.count = number
        module.get_buffer("layers.0.1.running_mean").fill_(number)
        with guard.guarding():
            write_through_data(module)
    assert guard.walks == walks
    module.extra = Holder()
    with guard.guarding():
        module.extra.count = 9
    assert guard.walks == walks + 1
    assert module.extra.count == 0


def test_a_large_tensor_that_starts_to_change_is_saved_from_then_on() -> None:
    module = Holder()
    guard = settled(module)
    with pytest.warns(UserWarning, match="for the first time"), guard.guarding():
        module.get_buffer("large").add_(1)
    with guard.guarding():
        module.get_buffer("large").add_(1)
    assert module.get_buffer("large").unique().tolist() == [1]
