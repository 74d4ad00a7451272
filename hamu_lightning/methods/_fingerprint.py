"""Short names of data and settings, by which results are found again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from types import CodeType
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hamu_lightning.randomness import RandomStream

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def fingerprint(*parts: Any) -> str:
    """Return 16 hexadecimal digits that change with any part, and with the versions of torch and Lightning."""
    versions = (torch.__version__, lightning.__version__)
    return hashlib.sha256("\n".join(map(describe, (*parts, versions))).encode()).hexdigest()[:16]


def describe(value: Any, inside: tuple[int, ...] = ()) -> str:
    """Return a text that is the same in another process and differs where the settings do.

    Functions count by their code, defaults and closure, dataclasses, containers and objects without a `repr` of their
    own by what they hold, tensors by their elements, everything else by its `repr` without addresses.

    Args:
        value: The settings.
        inside: The identities of what `value` is a part of.
    """
    if isinstance(value, Tensor):
        return hash_tensors([value])
    if id(value) in inside:
        return f"itself, {len(inside) - inside.index(id(value))} levels up"
    inside = (*inside, id(value))
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value)}
        return f"{type(value).__qualname__}{describe(held, inside)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item, inside)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(describe(item, inside) for item in value) + "]"
    if hasattr(value, "__code__"):
        closure = [cell.cell_contents for cell in value.__closure__ or ()]
        return describe([_describe_code(value.__code__), value.__defaults__, value.__kwdefaults__, closure], inside)
    kind: Any = type(value)
    if kind.__repr__ is object.__repr__ and hasattr(value, "__dict__"):
        return f"{type(value).__qualname__}{describe(vars(value), inside)}"
    return _ADDRESS.sub("", repr(value))


def hash_tensors(values: Any) -> str:
    """Return a hash of everything in nested containers of tensors and plain values."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(describe(leaf).encode())
    return digest.hexdigest()


def hash_batches(batches: Iterable[Any]) -> str:
    """Return a hash of the content of all batches. Random augmentations always draw the same numbers here."""
    with RandomStream(0).active():
        return hashlib.sha256("".join(map(hash_tensors, batches)).encode()).hexdigest()


def _describe_code(code: CodeType) -> str:
    inner = [_describe_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_name} {code.co_code.hex()} {code.co_names} {inner}"
