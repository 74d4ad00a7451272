"""How a value that hangs on a module is saved, and put back where a pass has changed it."""

from __future__ import annotations

import queue
import random
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Tensors and arrays up to this size are always saved; larger ones, and all parameters, once they were seen to change.
SMALL = 65_536
# A frozen parameter of more elements is not even copied to find that out, unless a trained one has its shape: averages
# of weights have. 16 MB in float32.
HUGE = 4_194_304
_SAMPLE = 1_024

# Where the memory is, how often it was written, and a sample of it; None where that cannot be told.
Mark = tuple[Any, ...] | None


class SavedTensor:
    """A tensor, and the way to put its contents back: into the same memory, in the shape that it had.

    Args:
        tensor: The tensor.
        is_trained: Whether its memory belongs to an optimizer and a strategy.

    Attributes:
        is_small: Whether it is saved at every pass.
        kind: What it is, in words.
    """

    def __init__(self, tensor: Tensor, is_trained: bool) -> None:
        self.tensor, self.kind = tensor, f"a tensor of shape {list(tensor.shape)}"
        self.is_small = tensor.numel() <= SMALL and not isinstance(tensor, nn.Parameter)
        self._memory = None if is_trained else tensor.data
        self._copy: Tensor | None = None

    def mark(self, is_thorough: bool) -> Mark:
        """Return what tells whether somebody has written; thorough ones read the device."""
        with suppress(RuntimeError, NotImplementedError):
            tensor = self.tensor.detach()
            mark = (tensor.data_ptr(), tuple(tensor.shape), self.tensor._version)
            if not is_thorough:
                return mark
            sample = tensor.view(-1)[:: max(1, tensor.numel() // _SAMPLE)].clone()
            return (*mark, sample.view(torch.uint8).cpu().numpy().tobytes())
        return None if is_thorough else (self.tensor._version,)

    def save(self, is_on_host: bool) -> bool:
        """Copy the contents; return whether that could be done."""
        with suppress(RuntimeError, NotImplementedError):  # some kinds of tensors cannot be copied
            value = self.tensor.detach()
            self._copy = value.to("cpu", copy=True) if is_on_host else value.clone()
            return True
        return False

    def settle(self) -> None:
        """Take the present memory for the one to come back to."""
        if self._memory is not None and _has_moved(self.tensor, self._memory):
            self._memory = self.tensor.data

    def put(self, copy: Tensor) -> None:
        """Take a copy of the contents for what was saved."""
        self._copy = copy

    def restore(self, is_sure: bool) -> bool:
        """Put back what was saved; return whether it had changed.

        Args:
            is_sure: Whether to write without comparing, where comparing would read the device.
        """
        tensor, copy = self.tensor, self._copy
        if self._memory is not None and _has_moved(tensor, self._memory):
            tensor.data = self._memory
        if copy is None or (not (is_sure and tensor.device.type != "cpu") and _is_equal(tensor, copy)):
            return False
        # `.data` leaves the version counter alone: a graph that the user keeps may refer to this tensor.
        if tensor.layout is torch.strided:
            own = _own_part(tensor)
            tensor.data[own].copy_(copy[own])
        else:
            tensor.data = copy.to(tensor.device)  # a sparse one has no memory of its shape
        return True


def _has_moved(tensor: Tensor, memory: Tensor) -> bool:
    with suppress(RuntimeError, NotImplementedError):  # some kinds of tensors have no address
        is_same = tensor.shape == memory.shape and tensor.stride() == memory.stride()
        return not is_same or tensor.data_ptr() != memory.data_ptr()
    return tensor.shape != memory.shape


def _is_equal(tensor: Tensor, copy: Tensor) -> bool:
    value = tensor.detach().to(copy.device)
    with suppress(RuntimeError, NotImplementedError):
        if value.layout in (torch.sparse_coo, torch.sparse_csr):
            value, copy = value.to_dense(), copy.to_dense()
        return torch.equal(value, copy)
    return False


def _own_part(tensor: Tensor) -> tuple[slice, ...]:
    """Where to find the part of an expanded tensor that has memory of its own."""
    is_repeated = (stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tuple(slice(0, 1) if repeated else slice(None) for repeated in is_repeated)


class SavedArray:
    """A NumPy array, and the way to put its contents back.

    Args:
        array: The array.

    Attributes:
        is_small: Whether it is saved at every pass.
        kind: What it is, in words.
    """

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array, self.kind = array, f"an array of shape {list(array.shape)}"
        self.is_small = array.size <= SMALL
        self._copy: np.ndarray[Any, Any] | None = None

    def mark(self, is_thorough: bool) -> Mark:
        """Return what tells whether somebody has written: arrays do not count how often, so that it is a sample."""
        flat = self.array.reshape(-1) if self.array.flags.c_contiguous else None
        return None if flat is None else (flat[:: max(1, flat.size // _SAMPLE)].tobytes(),)

    def save(self, is_on_host: bool) -> bool:
        """Copy the contents; return whether that was done: not of what nobody can write, or what is a file."""
        is_file = isinstance(self.array, np.memmap) and not self.is_small
        if self.array.flags.writeable and not is_file:
            self._copy = self.array.copy()
        return self._copy is not None

    def restore(self, is_sure: bool) -> bool:
        """Put back what was saved; return whether it had changed."""
        if self._copy is None or (not self.array.dtype.hasobject and _same_bytes(self.array, self._copy)):
            return False
        np.copyto(self.array, self._copy)
        return True


def _same_bytes(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    if one.flags.c_contiguous and one.size:
        first, second = (torch.from_numpy(array.reshape(-1).view(np.uint8)) for array in (one, other))
        return torch.equal(first, second)  # which makes no array of answers
    return bool(np.array_equal(one, other))


def save_data(value: Any, trained: set[int]) -> SavedTensor | SavedArray | None:
    """Return how a tensor or an array is saved; None for others, and where nothing can be saved.

    Args:
        value: The value.
        trained: Identities of the parameters that are trained.
    """
    if isinstance(value, np.ndarray):
        return SavedArray(value)
    # One that an earlier validation left cannot be changed in place while training; a lazy one has nothing in it.
    if not isinstance(value, Tensor) or value.is_inference() or is_lazy(value):
        return None
    return SavedTensor(value, id(value) in trained)


class SavedContainer:
    """A dict, set, list or deque, and the way to give it back the elements that it had.

    By the methods of the built-in types: subclasses give theirs other meanings.

    Args:
        container: One of these.
    """

    def __init__(self, container: Any) -> None:
        self.container = container
        self._copy: Any = _KINDS[self._kind()](container)

    def _kind(self) -> Any:
        return next(kind for kind in _KINDS if isinstance(self.container, kind))

    def has_changed(self) -> bool:
        """Whether an element is another object, or in another place. Of a set: whether one is not equal."""
        container, copy = self.container, self._copy
        if isinstance(container, dict):
            is_same = dict.keys(container) == copy.keys()
            return not (is_same and all(map(is_, map(partial(dict.__getitem__, container), copy), copy.values())))
        if isinstance(container, set):
            return bool(container != copy)
        return len(container) != len(copy) or not all(map(is_, container, copy))

    def restore(self) -> None:
        """Put the elements back. A container that has them is not touched."""
        if self.has_changed():
            kind = self._kind()
            kind.clear(self.container)
            (kind.extend if kind in (list, deque) else kind.update)(self.container, self._copy)

    def renew(self, constants: tuple[type, ...]) -> bool:
        """Take the present elements, if only such have changed as hold nothing; return whether that is so."""
        if not self.has_changed():
            return True
        container, copy = self.container, self._copy
        if not isinstance(container, dict) or dict.keys(container) != copy.keys():
            return False
        changed = {key: dict.__getitem__(container, key) for key, value in copy.items()}
        pairs = ((value, copy[key]) for key, value in changed.items() if value is not copy[key])
        if not all(isinstance(new, constants) and isinstance(old, constants) for new, old in pairs):
            return False
        copy.update(changed)
        return True


# How each kind is copied; a deque as a list.
_KINDS: dict[type, Callable[[Any], Any]] = {
    dict: lambda container: dict(dict.items(container)),
    set: set,
    list: list,
    deque: list,
}


def save_state(value: Any) -> Callable[[], object] | None:
    """For a random generator, a queue, bytes or a small pandas frame: what puts it back; None for others."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, queue.Queue):
        return SavedContainer(value.queue).restore
    if isinstance(value, bytearray):
        return partial(value.__setitem__, slice(None), bytes(value))
    if type(value).__module__.partition(".")[0] == "pandas" and 0 < getattr(value, "size", 0) <= SMALL:
        return partial(_restore_frame, value, value.copy())
    return None


def _restore_frame(frame: Any, copy: Any) -> None:
    if not frame.equals(copy):
        vars(frame).update(vars(copy))


def save_names(namespace: dict[str, Any]) -> Callable[[], object]:
    """Return what gives the names of an object its present values back, and takes new ones away.

    Names that have their values are not touched: another thread may be reading them.
    """
    return partial(_restore_names, namespace, dict(namespace))


def _restore_names(namespace: dict[str, Any], copy: dict[str, Any]) -> None:
    for name in namespace.keys() - copy.keys():
        del namespace[name]
    namespace.update({name: value for name, value in copy.items() if namespace.get(name) is not value})


def save_slots(value: Any) -> dict[str, Any]:
    """The attributes that a value has in slots."""
    names = (name for kind in type(value).__mro__ for name in _names(kind))
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _names(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    slots = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in slots if not name.startswith("__"))
