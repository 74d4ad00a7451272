"""Weights alone from a file."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from hamu_lightning.errors import HAMUStateError
from hamu_lightning.files import read_tensors

_CURE = "Give a checkpoint of Lightning, or a state dict that torch.save wrote."
_SHOWN = 3


def read_weights(path: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint of Lightning, or of a state dict; nothing in the file is executed.

    Raises:
        HAMUStateError: If it is no such file.
    """
    try:
        content = read_tensors(Path(path), "a checkpoint", _CURE)
    except FileNotFoundError as error:
        raise HAMUStateError(f"Expected {path!r} to be a checkpoint, but there is no such file. {_CURE}") from error
    weights = content.get("state_dict", content)
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


def load_weights(module: nn.Module, path: str) -> None:
    """Load all weights of a module from a file.

    Raises:
        HAMUStateError: If the file has not just the weights of this module.
    """
    weights, own = read_weights(path), module.state_dict()
    faults = [f"no {name}" for name in own if name not in weights]
    faults += [f"{name}, which the module has not" for name in weights if name not in own]
    faults += [
        f"{name} of shape {list(weights[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise HAMUStateError(
            f"Expected {path!r} to hold the weights of {type(module).__name__}, but it has {'; '.join(faults[:_SHOWN])}"
            f"{more}. Give --model the arguments that it was trained with."
        )
    module.load_state_dict(weights, strict=True)
