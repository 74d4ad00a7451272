"""Hashes of weights that are the same on every device and in every file format."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hamu_lightning.checks import check_type
from hamu_lightning.evidence._rows import AttackRow
from hamu_lightning.metrics.functional import Estimate, undefined

Weights: TypeAlias = nn.Module | Mapping[str, Any]


def hash_weights(weights: Weights) -> dict[str, str]:
    """Return for each tensor of a model, sorted by its name, the SHA-256 of its type, its shape and its elements.

    Elements count in row-major order, little-endian, whatever device, memory layout or file they come from. Buffers are
    among the tensors; other values of a state dict are left out.

    Args:
        weights: A module, or a state dict.

    Raises:
        HAMUValueError: If it is something else.

    Example:
        >>> first, second = ({"b": torch.ones(2), "a": x} for x in (torch.eye(2), torch.eye(2).T))
        >>> list(hash_weights(first)), hash_weights(first) == hash_weights(second)
        (['a', 'b'], True)
    """
    return {name: hash_tensor(tensor) for name, tensor in sorted(_tensors(weights).items())}


def hash_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of one tensor: "float32 [2, 3]", a zero byte, and its elements."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    flat = whole.detach().to_dense().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    digest = hashlib.sha256(f"{str(flat.dtype).removeprefix('torch.')} {list(whole.shape)}\0".encode())
    digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def join_hashes(hashes: Mapping[str, str]) -> str:
    """Return one SHA-256 of all tensors: of the lines "<hash>  <name>", sorted by name.

    Example:
        >>> join_hashes({"a": "00", "b": "11"}) == join_hashes({"b": "11", "a": "00"})
        True
    """
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def compare_weights(before: Weights, after: Weights) -> AttackRow:
    """Return the share of weights that are in tensors which did not change at all: the row "unchanged".

    Where it is large the features of the original are still there, whatever the answers are. Buffers do not count where
    modules are given.

    Args:
        before: The original, a module or its state dict.
        after: The unlearned model.

    Example:
        >>> from copy import deepcopy
        >>> model = nn.Sequential(nn.Linear(30, 10), nn.Linear(10, 2))
        >>> other = deepcopy(model)
        >>> other[1].reset_parameters()
        >>> compare_weights(model, other).value.value > 0.9
        True
    """
    old, new = _parameters(before), _parameters(after)
    total = sum(tensor.numel() for tensor in new.values())
    same = sum(t.numel() for name, t in new.items() if name in old and hash_tensor(old[name]) == hash_tensor(t))
    value = Estimate(same / total, n=(total,), ideal=0.0) if total else undefined("there are no weights", (0,))
    return AttackRow("unchanged", value, None, "share of the weights that are in tensors which did not change at all")


def _tensors(weights: Weights) -> dict[str, Tensor]:
    check_type("weights", weights, nn.Module | Mapping, "a module or a state dict")
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _parameters(weights: Weights) -> dict[str, Tensor]:
    if isinstance(weights, nn.Module):
        return dict(weights.named_parameters())
    return {name: tensor for name, tensor in _tensors(weights).items() if tensor.is_floating_point()}
