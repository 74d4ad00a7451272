"""Files that are whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch


def save_weights(path: Path, state: dict[str, Any]) -> None:
    """Write a state dict."""
    _write(path, lambda file: torch.save(state, file))


def load_weights(path: Path) -> dict[str, Any] | None:
    """Read a state dict; None where there is none. Nothing in the file is executed."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def save_json(path: Path, content: Any) -> None:
    """Write JSON. Numbers that are not finite are written as NaN and Infinity, which Python reads back."""
    _write(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def load_json(path: Path) -> Any | None:
    """Read JSON; None where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of its own for each process, and in the same folder: only there is the last step atomic.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as file:
            write(file)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
