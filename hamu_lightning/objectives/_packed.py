"""Batches in which several sequences stand in one row: which token belongs to which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hamu_lightning.errors import HAMUValueError

_NUMBERS = ("seq_idx", "segment_ids")
_BOUNDS = ("cu_seq_lens_q", "cu_seqlens")


def find_sequences(batch: Any, shape: torch.Size) -> Tensor | None:
    """The number of the sequence of each token, int64 `[N, T]`; None where each row is one sequence.

    Packed (padding-free) batches are known by an entry: `seq_idx` or `segment_ids` `[N, T]`, `cu_seq_lens_q` or
    `cu_seqlens` (the places in the row where sequences begin, and its length), or `position_ids` `[N, T]` that begin
    at 0 more than once in a row. Only a batch with such an entry is read on the host, once.

    Args:
        batch: The batch.
        shape: `[N, T]`.
    """
    begins = _find_begins(batch, shape) if isinstance(batch, Mapping) and len(shape) == 2 else None
    if begins is None or int(begins.sum()) == len(begins):
        return None
    return begins.flatten().cumsum(0).reshape(shape) - 1


def check_padded(batch: Any, shape: torch.Size, who: str) -> None:
    """Raise unless each row is one sequence.

    Raises:
        HAMUValueError: If several sequences stand in one row.
    """
    if find_sequences(batch, shape) is not None:
        raise HAMUValueError(
            f"Expected each row of the batch to be one sequence for {who}, but several are packed into one. Give this "
            "stream padded batches: a collator that pads, such as PadCollator, in the place of one that flattens."
        )


def _find_begins(batch: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """Where sequences begin, bool `[N, T]`; None where the batch does not say."""
    for name in _NUMBERS:
        numbers = batch.get(name)
        if isinstance(numbers, Tensor) and numbers.shape == shape:
            return _with_rows(numbers != numbers.roll(1, dims=1))
    for name in _BOUNDS:
        bounds = batch.get(name)
        if isinstance(bounds, Tensor) and bounds.dim() == 1:
            # The length of the row is among the bounds, in some programs several times.
            begins = torch.zeros(shape.numel() + 1, dtype=torch.bool, device=bounds.device)
            return _with_rows(begins.index_fill(0, bounds.long(), True)[:-1].reshape(shape))
    positions, attention = batch.get("position_ids"), batch.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.shape != shape:
        return None
    begins = positions == 0
    if isinstance(attention, Tensor) and attention.shape == shape:
        begins &= attention.bool()  # padding on the left counts from 0 as well
    return begins | _with_rows(torch.zeros_like(begins)) & ~begins.any(1, keepdim=True)


def _with_rows(begins: Tensor) -> Tensor:
    """With the first place of each row."""
    begins = begins.clone()
    begins[:, 0] = True
    return begins
