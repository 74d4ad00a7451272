"""Files that are whole or absent, and that say so when they are not ours."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from hamu_lightning.errors import HAMUStateError

__all__ = ["UNFINISHED", "hash_weights", "read_tensors", "write_new", "write_whole"]

UNFINISHED = ".unfinished"
"""How the names of files end that are being written."""


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under a name of its own, and then give it its name: whoever reads it meanwhile finds the old one.

    Args:
        path: The file; its folder is made.
        write: Writes to an open file.

    Raises:
        HAMUStateError: If the system refuses.
    """
    _write(path, write, os.replace)


def write_new(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file unless it is there already: of several processes at once the first one writes it.

    Args:
        path: The file; its folder is made.
        write: Writes to an open file.

    Raises:
        HAMUStateError: If the system refuses.
    """
    if not path.exists():
        _write(path, write, _name_if_new)


def read_tensors(path: Path, kind: str, cure: str) -> dict[str, Any]:
    """Read a dict that `torch.save` wrote, mapped into memory. Nothing in the file is executed.

    Args:
        path: The file.
        kind: What the file should be, in words.
        cure: What to do where it is something else, a sentence.

    Raises:
        HAMUStateError: If it is cut off, or something else.
    """
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # what a broken file raises depends on where it is broken
        raise HAMUStateError(
            f"Expected {str(path)!r} to be {kind}, but it cannot be read: {type(error).__name__}. {cure}"
        ) from error
    if not isinstance(content, dict):
        raise HAMUStateError(f"Expected {str(path)!r} to be {kind}, but it holds a {type(content).__name__}. {cure}")
    return content


def hash_weights(weights: Mapping[str, Any]) -> str:
    """Return a hash of all tensors of a state dict with their names.

    Example:
        >>> hash_weights({"a": torch.ones(2)}) == hash_weights({"a": torch.ones(3)})
        False
    """
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        if isinstance(tensor, Tensor):
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            digest.update(f"{name} {whole.dtype} {list(whole.shape)}".encode())
            flat = whole.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _write(path: Path, write: Callable[[IO[bytes]], object], finish: Callable[[Path, Path], object]) -> None:
    # Of its own for each writer, and in the same folder: only there is the last step atomic.
    unfinished = path.with_name(f"{path.name[:100]}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                write(file)
            finish(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError where the disk is full
        raise HAMUStateError(
            f"Expected to write {str(path)!r}, but could not: {str(error).splitlines()[0]}. Nothing was left there; "
            "make room, or give another folder."
        ) from error


def _name_if_new(unfinished: Path, path: Path) -> None:
    try:
        os.link(unfinished, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(unfinished, path)
