"""What a TorchJD module remembers from call to call, as tensors and plain values that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def save_attributes(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the state of a module and its submodules, by their names.

    TorchJD keeps state in buffers that may be None and in plain attributes, which `nn.Module.state_dict` leaves out.
    Its settings are attributes with a property; they belong to whoever built the module, and so do solver objects.
    """
    saved = {}
    for name, part in module.named_modules():
        found = {**vars(part), **part._buffers}
        state = {k: v for k, v in found.items() if k not in _OF_EVERY_MODULE and not _is_setting(part, k)}
        saved[name] = {key: _encode(value) for key, value in state.items() if _is_plain(value)}
    return saved


def load_attributes(module: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Load what `save_attributes` returned into a module that was built alike."""
    for name, state in saved.items():
        part = module.get_submodule(name)
        for key, value in state.items():
            setattr(part, key, _decode(value))


def _is_setting(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(type(module), name.removeprefix("_"), None), property)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | Tensor | np.ndarray | torch.dtype)


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value.copy())}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return value.detach().clone() if isinstance(value, Tensor) else value


def _decode(value: Any) -> Any:
    if not isinstance(value, dict):
        return value.clone() if isinstance(value, Tensor) else value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(map(_decode, content))
    return content.numpy().copy() if kind == "array" else getattr(torch, content)
