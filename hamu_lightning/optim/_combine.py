"""The one pass that writes `a g_r + b g_f`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# x + (-0.0) is x for every x, 0.0 and -0.0 included: the neutral element that keeps a lone gradient bit for bit.
_NOTHING = -0.0


def combine_(retain: Sequence[Tensor | None], forget: Sequence[Tensor | None], factors: Tensor) -> list[Tensor | None]:
    """Combine two lists of gradients tensor by tensor, writing over the forget gradients.

    A gradient whose factor is 0 does not count at all: not even its NaN. Sums are taken in float32 or wider.

    Args:
        retain: The retain gradients; they stay as they are.
        forget: The forget gradients; their memory takes the result.
        factors: `[T, 2]`, what the two gradients of each tensor are multiplied by.

    Returns:
        For each tensor the combined gradient, or None where both are None.
    """
    columns = factors.unbind(dim=0)
    return [_combine_one_(r, f, *c.unbind()) for r, f, c in zip(retain, forget, columns, strict=True)]


def _combine_one_(retain: Tensor | None, forget: Tensor | None, a: Tensor, b: Tensor) -> Tensor | None:
    if forget is None:
        return None if retain is None else _scaled(retain, a).to(retain.dtype)
    if retain is None:
        return _scaled(forget, b).to(forget.dtype)
    total = _add(_scaled(retain, a), _scaled(forget, b))
    if forget.is_sparse or retain.is_sparse:
        return total
    return forget.copy_(total)


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    if grad.is_sparse:
        grad = grad.coalesce()
        values = _scaled(grad.values(), factor)
        return torch.sparse_coo_tensor(grad.indices(), values, grad.shape, is_coalesced=True, check_invariants=False)
    wide = torch.promote_types(grad.dtype, torch.float32)
    product = grad.to(wide) * factor.to(wide)
    return torch.where(factor == 0, _NOTHING, product)


def _add(a: Tensor, b: Tensor) -> Tensor:
    return b + a if a.is_sparse else a + b
