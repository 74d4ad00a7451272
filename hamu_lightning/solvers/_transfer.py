"""One copy to the host, one copy back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hamu_lightning.gramian import widest_float
from hamu_lightning.solvers._projection import Array


def to_host(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors to the host, in float64: those on `device` in one packed copy; the others are there already."""
    there = [index for index, tensor in enumerate(tensors) if tensor.device == device]
    wide = [tensors[index].detach().reshape(-1).to(widest_float(device)) for index in there]
    packed = torch.cat(wide).cpu().double() if wide else torch.empty(0)
    pieces = dict(zip(there, torch.split_with_sizes(packed, [piece.numel() for piece in wide]), strict=True))
    return [
        pieces[index].view(tensor.shape) if index in pieces else tensor.detach().cpu().double()
        for index, tensor in enumerate(tensors)
    ]


def to_device(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Copy arrays to the device in one packed copy."""
    host = [torch.from_numpy(array).to(widest_float(device)) for array in arrays]
    packed = torch.cat([piece.reshape(-1) for piece in host]).to(device)
    return [
        piece.view(like.shape)
        for piece, like in zip(torch.split_with_sizes(packed, [piece.numel() for piece in host]), host, strict=True)
    ]
