"""What is kept between calls: weights and numbers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from hamu_lightning.errors import HAMUStateError
from hamu_lightning.files import hash_weights, read_tensors, write_whole

_CURE = "Delete it; the model is then trained again."


def save_weights(path: Path, state: dict[str, Any]) -> None:
    """Write a state dict, with a hash of it and of the file's name."""
    content = {"weights": state, "seal": _seal(path, state)}
    write_whole(path, lambda file: torch.save(content, file))


def load_weights(path: Path) -> dict[str, Any] | None:
    """Read a state dict; None where there is none. Nothing in the file is executed.

    Raises:
        HAMUStateError: If the file is broken, or holds other weights than were written under this name.
    """
    if not path.exists():
        return None
    content = read_tensors(path, "weights that Retrain wrote", _CURE)
    weights: dict[str, Any] | None = content.get("weights")
    if not isinstance(weights, dict) or content.get("seal") != _seal(path, weights):
        raise HAMUStateError(
            f"Expected {str(path)!r} to hold the weights that Retrain wrote there, but it holds others. {_CURE}"
        )
    return weights


def save_json(path: Path, content: Any) -> None:
    """Write JSON. Numbers that are not finite are written as NaN and Infinity, which Python reads back."""
    text = json.dumps(content, indent=1).encode()
    write_whole(path, lambda file: file.write(text))


def load_json(path: Path) -> Any | None:
    """Read JSON; None where there is no file.

    Raises:
        HAMUStateError: If the file is broken.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HAMUStateError(
            f"Expected {str(path)!r} to be a run that `compare` wrote, but it cannot be read. Delete it; it is then "
            "run again."
        ) from error


def _seal(path: Path, weights: dict[str, Any]) -> str:
    return hashlib.sha256(f"{path.stem} {hash_weights(weights)}".encode()).hexdigest()
