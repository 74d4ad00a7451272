"""Finds out what a pass changes in a module, and puts it back: the forget pass leaves no trace."""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

# Tensors up to this size are always saved; larger ones, and all parameters, only once they were seen to change.
_SMALL = 65_536
# Longer containers are saved, but their elements are not looked at one by one.
_LONG = 1_000
# torch's own attributes of a module that a training step does not change (hooks); the others are looked at.
_SKIPPED = frozenset(nn.Module().__dict__) - {"training", "_parameters", "_buffers", "_modules"} | {
    "_trainer",
    "_fabric",
}
# Data and optimizers may hang on a module; a training step does not own them.
_NOT_OWNED = (Dataset, DataLoader, Optimizer)
_CONSTANTS = (int, float, str, bytes, bool, complex, type(None), type, torch.dtype, torch.device, torch.Size)
_FRAMEWORKS = frozenset({"torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "builtins"})

_Place = tuple[int, Any]


class ModuleGuard:
    """Undoes what happens to a module inside `with guard.guarding():`.

    Covered are buffers, parameters (an average kept through `.data` among them), the states of torchmetrics, and the
    plain attributes of all submodules: numbers, lists, dicts, tensors, arrays, random generators, and objects of
    classes from the packages that the module's own classes come from.

    Copying everything at every pass would cost a copy of the model. So large tensors and parameters are copied at a
    *look* only: during the first three windows (steps of the optimizer: what follows the weights rests until they have
    moved), and again after each `look_again()`. Those that changed are saved from then on.
    A large tensor that starts to change between two looks is noticed by its version counter, with a warning, and saved
    from the next pass on. Copies made at a look live in host memory.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._packages = {type(m).__module__.partition(".")[0] for m in module.modules()} - _FRAMEWORKS
        self._packages |= {base.__module__.partition(".")[0] for base in type(module).__mro__} - _FRAMEWORKS
        self._changing: set[_Place] = set()
        self._looks = 3

    def look_again(self) -> None:
        """Compare everything again in the next window: the module may have started to change something else."""
        self._looks = max(self._looks, 1)

    def end_window(self) -> None:
        """Say that the optimizer has stepped."""
        self._looks = max(self._looks - 1, 0)

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Undo, at the end, every change to the module; after an exception too."""
        snapshot = _Snapshot(self._packages, self._changing, is_look=self._looks > 0)
        snapshot.take(self._module)
        try:
            yield
        finally:
            snapshot.restore()


class _Snapshot:
    """The state of a module, as far as it is worth saving."""

    def __init__(self, packages: set[str], changing: set[_Place], is_look: bool) -> None:
        self._packages, self._changing, self._is_look = packages, changing, is_look
        self._seen: set[int] = set()
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[_Place, Tensor, Tensor | None, int]] = []
        self._undo: list[Callable[[], object]] = []

    def take(self, root: nn.Module) -> None:
        """Walk over everything that hangs on the module."""
        todo: list[tuple[_Place, Any]] = [((0, None), root)]
        while todo:
            place, value = todo.pop()
            if isinstance(value, _CONSTANTS) or id(value) in self._seen:
                continue
            self._seen.add(id(value))
            todo.extend(self._save(place, value))

    def _save(self, place: _Place, value: Any) -> list[tuple[_Place, Any]]:
        """Save one value; return what hangs on it."""
        if isinstance(value, _NOT_OWNED):
            return []
        if isinstance(value, Tensor):
            self._save_tensor(place, value)
        elif isinstance(value, dict | list | set | deque):
            return self._save_container(value)
        elif isinstance(value, tuple):
            return [((id(value), i), v) for i, v in enumerate(value)] if len(value) <= _LONG else []
        elif isinstance(value, nn.Module):
            return self._save_container(value.__dict__, skipped=_SKIPPED)
        elif (undo := _make_undo(value)) is not None:
            self._undo.append(undo)
        elif type(value).__module__.partition(".")[0] in self._packages and hasattr(value, "__dict__"):
            return self._save_container(value.__dict__)
        return []

    def _save_container(self, container: Any, skipped: frozenset[str] = frozenset()) -> list[tuple[_Place, Any]]:
        # `dict(...)` rather than `.copy()`: subclasses give that method other meanings.
        self._containers.append((container, dict(container) if isinstance(container, dict) else container.copy()))
        if len(container) > _LONG:
            return []
        items = container.items() if isinstance(container, dict) else enumerate(container)
        return [((id(container), key), value) for key, value in items if key not in skipped]

    def _save_tensor(self, place: _Place, tensor: Tensor) -> None:
        if tensor.is_inference():
            return  # left by an earlier validation; torch lets nobody change it in place while training
        is_small = tensor.numel() <= _SMALL and not isinstance(tensor, nn.Parameter)
        copy = None
        if is_small or place in self._changing:
            copy = tensor.detach().clone()
        elif self._is_look:
            copy = tensor.detach().to("cpu", copy=True)
        self._tensors.append((place, tensor, copy, tensor._version))

    def restore(self) -> None:
        """Put everything back."""
        for container, copy in self._containers:
            _restore_container(container, copy)
        for undo in self._undo:
            undo()
        for place, tensor, copy, version in self._tensors:
            self._restore_tensor(place, tensor, copy, version)

    def _restore_tensor(self, place: _Place, tensor: Tensor, copy: Tensor | None, version: int) -> None:
        if copy is None:
            if tensor._version != version:
                self._changing.add(place)
                warnings.warn(
                    f"The forget pass changed a tensor of shape {list(tensor.shape)} of the module for the first time "
                    "in this epoch. This one change could not be undone; it is from the next pass on.",
                    stacklevel=2,
                )
            return
        if self._is_look and place not in self._changing:
            if torch.equal(tensor.detach().to(copy.device), copy):
                return
            self._changing.add(place)
        # `.data` leaves the version counter alone: a graph that the user keeps may refer to this tensor.
        tensor.data.copy_(copy)


def _restore_container(container: Any, copy: Any) -> None:
    if isinstance(container, dict):
        if container.keys() != copy.keys() or any(container[key] is not value for key, value in copy.items()):
            # Not by assignment: dict subclasses (and modules) attach meaning to that.
            dict.clear(container)
            dict.update(container, copy)
    elif isinstance(container, set):
        if container != copy:
            container.clear()
            container.update(copy)
    elif len(container) != len(copy) or any(a is not b for a, b in zip(container, copy, strict=True)):
        container.clear()
        container.extend(copy)


def _make_undo(value: Any) -> Callable[[], object] | None:
    """For an array or a random generator: a function that puts its present contents back."""
    if isinstance(value, np.ndarray):
        return partial(np.copyto, value, value.copy())
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None
