"""Finds out what a pass changes in a module, and puts it back: the forget pass leaves no trace."""

from __future__ import annotations

import sys
import sysconfig
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from hamu_lightning.callbacks.passes._saved import (
    HUGE,
    Mark,
    SavedArray,
    SavedContainer,
    SavedTensor,
    save_data,
    save_names,
    save_slots,
    save_state,
)
from hamu_lightning.callbacks.passes._together import Part, Together

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
_FRAMEWORKS = frozenset(
    {"hamu_lightning", "torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "builtins"}
)

_Place = tuple[int, Any]


class ModuleGuard:
    """Undoes what happens to a module inside `with guard.guarding():`.

    Covered are buffers, parameters (an average kept through `.data` among them), the states of torchmetrics, and the
    plain attributes of all submodules and of the datamodule: numbers, lists, dicts, tensors, arrays, random generators,
    queues, small pandas frames, and objects of classes of one's own: from the packages that the module's classes come
    from, or from a file that is in no installed package. Of the trainer the attributes themselves are covered (a count,
    `should_stop`), not what they hold.

    Copying everything at every pass would cost a copy of the model. So large tensors and arrays, and parameters, are
    copied at a *look* only: during the first three windows (steps of the optimizer: what follows the weights rests
    until they have moved), and after each `look_again()`. Those that changed are saved from then on. Huge frozen
    parameters are copied only if a trained one has their shape, as in an average.
    What is not copied and starts to change is noticed (by its version counter, at looks by a sample of its contents),
    with a warning, and saved from the next pass on. Copies made at a look live in host memory.

    Args:
        module: The module.

    Attributes:
        walks: How often it had to find out what hangs on the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._packages = {type(m).__module__.partition(".")[0] for m in module.modules()} - _FRAMEWORKS
        self._packages |= {base.__module__.partition(".")[0] for base in type(module).__mro__} - _FRAMEWORKS
        self._changing: set[_Place] = set()
        self._marks: dict[_Place, Mark] = {}
        self._looks = 3
        self._last: _Snapshot | None = None
        self.walks = 0

    def look_again(self) -> None:
        """Compare again in the next window: the module may have started to change something else."""
        self._looks = max(self._looks, 1)

    def end_window(self) -> None:
        """Say that the optimizer has stepped."""
        self._looks = max(self._looks - 1, 0)

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Undo, at the end, every change to the module; after an exception too."""
        # Not while it is in use: a pass inside of a pass takes its own.
        snapshot, self._last = self._last, None
        if self._looks > 0 or snapshot is None or not snapshot.renew():
            snapshot = _Snapshot(self._packages, self._changing, self._marks, self._looks > 0)
            snapshot.take(self._module)
            self.walks += 1
        try:
            yield
        finally:
            snapshot.restore()
            self._last = snapshot if snapshot.lasts else None


class _Snapshot:
    """The state of a module, as far as it is worth saving.

    Walking over a module takes longer than saving it. So a snapshot can be taken again, of the same objects, as long as
    every container on the way still holds them.

    Args:
        packages: From which the classes of objects are taken for the module's own.
        changing: Places that were seen to change; takes more in.
        marks: Of the places at the last look; takes the present ones.
        is_look: Whether to find out what changes.

    Attributes:
        lasts: Whether it can be taken again.
    """

    def __init__(self, packages: set[str], changing: set[_Place], marks: dict[_Place, Mark], is_look: bool) -> None:
        self._packages, self._changing, self._marks = packages, changing, marks
        self._is_look = is_look
        self._seen: set[int] = set()
        self._data: list[Part] = []
        self._undo: list[Callable[[], object]] = []
        self._containers: list[SavedContainer] = []
        self._states: list[Any] = []
        self._names: dict[str, Any] = {}
        self.lasts = not is_look
        self._together: Together | None = None

    def take(self, root: nn.Module) -> None:
        """Walk over everything that hangs on the module and its datamodule."""
        trained = [p for p in root.parameters() if p.requires_grad and not is_lazy(p)]
        self._trained, self._shapes = {id(p) for p in trained}, {p.shape for p in trained}
        trainer = getattr(root, "_trainer", None)
        if trainer is not None:
            self._names = vars(trainer)
            self._undo.append(save_names(self._names))
        datamodule = getattr(trainer, "datamodule", None)
        todo: list[tuple[_Place, Any]] = [((0, None), root)]
        if datamodule is not None:
            todo += self._save_container(datamodule.__dict__)
        while todo:
            place, value = todo.pop()
            if isinstance(value, _CONSTANTS) or id(value) in self._seen:
                continue
            self._seen.add(id(value))
            with suppress(Exception):  # of a class with its own mind about attributes and copies
                todo.extend(self._save(place, value))

    def _save(self, place: _Place, value: Any) -> list[tuple[_Place, Any]]:
        """Save one value; return what hangs on it."""
        if isinstance(value, _NOT_OWNED):
            return []
        if (data := save_data(value, self._trained)) is not None:
            self._save_data(place, data)
        elif isinstance(value, nn.Module):
            return self._save_container(value.__dict__, skipped=_SKIPPED)
        elif isinstance(value, dict | list | set | deque):
            return self._save_container(value)
        elif isinstance(value, tuple):
            return [((id(value), i), v) for i, v in enumerate(value)] if len(value) <= _LONG else []
        elif (undo := save_state(value)) is not None:
            self._undo.append(undo)
            self._states.append(value)
        elif type(value).__module__.partition(".")[0] in self._packages or _is_own(type(value).__module__):
            return self._save_object(value)
        return []

    def _save_object(self, value: Any) -> list[tuple[_Place, Any]]:
        slots = save_slots(value)
        self.lasts &= not slots
        self._undo += [partial(object.__setattr__, value, name, held) for name, held in slots.items()]
        held = [((id(value), name), part) for name, part in slots.items()]
        return held + (self._save_container(value.__dict__) if hasattr(value, "__dict__") else [])

    def _save_container(self, container: Any, skipped: frozenset[str] = frozenset()) -> list[tuple[_Place, Any]]:
        self._containers.append(SavedContainer(container))
        if len(container) > _LONG:
            return []
        items = dict.items(container) if isinstance(container, dict) else enumerate(container)
        return [((id(container), key), value) for key, value in items if key not in skipped]

    def _save_data(self, place: _Place, data: SavedTensor | SavedArray) -> None:
        is_kept, mark = data.is_small or place in self._changing, None
        if is_kept:
            is_kept = data.save(is_on_host=False)
        elif self._is_look:
            mark = data.mark(is_thorough=True)
            if self._may_change(data):
                is_kept = data.save(is_on_host=True)
            self._marks[place] = mark
        if not is_kept and mark is None:
            mark = data.mark(is_thorough=False)
        self._data.append(Part(place, data, is_kept, mark))

    def _may_change(self, data: SavedTensor | SavedArray) -> bool:
        """Whether something is worth a copy, to see whether the pass changes it."""
        is_frozen = isinstance(data, SavedTensor) and isinstance(data.tensor, nn.Parameter)
        if not is_frozen or id(data.tensor) in self._trained or data.tensor.numel() <= HUGE:  # type: ignore[union-attr]
            return True
        return data.tensor.shape in self._shapes  # type: ignore[union-attr]

    def renew(self) -> bool:
        """Take it again, of the same objects; return whether they are all that there is now."""
        with suppress(Exception):
            if not self.lasts or not all(container.renew(_CONSTANTS) for container in self._containers):
                return False
            undos = [save_state(value) for value in self._states]
            self._undo = [*([save_names(self._names)] if self._names else []), *(u for u in undos if u is not None)]
            if self._together is None:
                self._together = Together(self._data)
            return self._together.renew()
        return False

    def restore(self) -> None:
        """Put everything back."""
        for undo in (*self._undo, *(container.restore for container in self._containers)):
            with suppress(Exception):
                undo()
        for place, data, is_kept, mark in self._data if self._together is None else self._together.changed():
            try:
                has_changed = data.restore(is_sure=data.is_small or place in self._changing)
            except Exception as error:
                warnings.warn(
                    f"The forget pass changed {data.kind} of the module, which cannot be put back: {error}",
                    stacklevel=2,
                )
                continue
            if not is_kept:
                self._notice(place, data, mark)
            elif has_changed:
                self._changing.add(place)

    def _notice(self, place: _Place, data: SavedTensor | SavedArray, mark: Mark) -> None:
        """Warn of a change to what was not saved."""
        is_thorough = self._is_look and place in self._marks
        now = data.mark(is_thorough)
        if mark is None or now is None or now == mark:
            return
        self._changing.add(place)
        self.lasts = False  # what hangs there is saved from the next one on
        warnings.warn(
            f"The forget pass changed {data.kind} of the module for the first time in this epoch. This "
            "one change could not be undone; it is from the next pass on.",
            stacklevel=2,
        )


@cache
def _is_own(module: str) -> bool:
    """Whether a Python module is somebody's own file: in no installed package, and not of Python itself."""
    file = getattr(sys.modules.get(module), "__file__", None)
    installed = [path for name, path in sysconfig.get_paths().items() if name in ("stdlib", "purelib", "platlib")]
    is_installed = (
        file is None or "site-packages" in file or "dist-packages" in file or file.startswith(tuple(installed))
    )
    return module == "__main__" or not (is_installed or module.partition(".")[0] in _FRAMEWORKS)
