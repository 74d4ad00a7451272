"""Functions of the rows of logits, piece by piece: no second tensor of their size but the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

# From logits `[n, t, V]`, labels `[n, t]` and others' logits `[n, t, V]` a number for each row, `[n, t]`.
RowFunction: TypeAlias = Callable[..., Tensor]
# Fewer logits are taken at once (4 MiB in float32); more in so many pieces, that what is computed in between is small
# beside them, and the pieces are few.
_FEW = 2**20
_PIECES = 64


def map_rows(function: RowFunction, logits: Tensor, labels: Tensor, mask: Tensor, *others: Tensor) -> Tensor:
    """Apply a function to each row of logits, in float32 or wider.

    Large logits are taken in pieces, forward and (computed once more) backward: beside the logits there is one tensor
    of their size, their gradient. The pieces follow from the shapes, so that nothing is read on the host. What stands
    in rows outside of the mask is read as 0, and gets no gradient.

    Args:
        function: What is computed; differentiable in its first argument.
        logits: `[N, T, V]`, of any floating dtype.
        labels: `[N, T]`.
        mask: `[N, T]`, bool.
        *others: Further `[N, T, V]`, without a gradient.

    Returns:
        `[N, T]`.
    """

    def compute(where: Any, scores: Tensor) -> Tensor:
        kept = mask[where]
        return function(_blanked(scores, kept), labels[where], *(_blanked(other[where], kept) for other in others))

    if logits.numel() <= _FEW:
        return compute(..., logits)
    found: Tensor = _Pieces.apply(logits, compute)  # type: ignore[no-untyped-call]
    return found


class _Pieces(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, logits: Tensor, compute: Callable[[Any, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.compute = compute
        values = logits.new_empty(logits.shape[:2], dtype=_widened(logits))
        for where in _cut(*logits.shape[:2]):
            values[where] = compute(where, logits[where])
        return values

    @staticmethod
    @override
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        found = torch.empty_like(logits)
        for where in _cut(*logits.shape[:2]):
            scores = logits[where].detach().requires_grad_()
            with torch.enable_grad():
                values = ctx.compute(where, scores)
            (found[where],) = torch.autograd.grad(values, scores, slope[where])
        return found, None


def _cut(samples: int, places: int) -> Iterator[tuple[slice, slice]]:
    """Cut `[N, T]` into pieces of samples, or of the places of one sample."""
    rows = -(-samples * places // _PIECES)
    n, t = max(1, rows // places), min(rows, places)
    for i in range(0, samples, n):
        for j in range(0, places, t):
            yield slice(i, i + n), slice(j, j + t)


def _widened(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _blanked(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.to(_widened(logits)).masked_fill(~mask.unsqueeze(-1), 0.0)
