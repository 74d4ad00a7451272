"""The one pass that writes `a g_r + b g_f`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hamu_lightning.gramian import compute_gramian


def combine_(
    retain: Sequence[Tensor | None], forget: Sequence[Tensor | None], factors: Tensor, is_finite: Tensor
) -> tuple[list[Tensor | None], Tensor]:
    """Combine two lists of gradients tensor by tensor, writing over the forget gradients.

    Sums are taken in float32 or wider. A result can be too large for float16: then none of them is finite.

    Args:
        retain: The retain gradients; they stay as they are.
        forget: The forget gradients; their memory takes the result.
        factors: `[T, 2]`, what the two gradients of each tensor are multiplied by.
        is_finite: 0-d, bool. Where it is False the result is zero, whatever the gradients hold.

    Returns:
        For each tensor the combined gradient, or None where both are None; and whether they are finite, 0-d, bool.
    """
    combined: list[Tensor | None] = list(forget)
    usual: list[tuple[int, Tensor, Tensor]] = []
    for index, (r, f) in enumerate(zip(retain, forget, strict=True)):
        if r is not None and f is not None and _is_usual(r) and _is_usual(f):
            usual.append((index, r, f))
        else:
            combined[index] = _combine_one(r, f, factors[index], is_finite)
    if usual:
        indices, sources, targets = map(list, zip(*usual, strict=True))
        a, b = ([*column.unbind()] for column in factors[indices].unbind(dim=1))
        torch._foreach_mul_(targets, b)
        torch._foreach_add_(targets, torch._foreach_mul(sources, a))
        is_bad = ~is_finite
        for target in targets:
            target.masked_fill_(is_bad, 0)
    halves = [grad for grad in combined if grad is not None and grad.dtype is torch.float16]
    if not halves:
        return combined, is_finite
    is_finite = is_finite & compute_gramian(halves).isfinite().all()
    one = torch.ones_like(factors[0, 0])
    return [None if grad is None else _scaled(grad, one, is_finite).to(grad.dtype) for grad in combined], is_finite


def _is_usual(grad: Tensor) -> bool:
    """Whether torch's operators on whole lists take the gradient; 16-bit sums would lose the quota to cancellation."""
    return type(grad) is Tensor and not grad.is_sparse and grad.dtype in (torch.float32, torch.float64)


def _combine_one(retain: Tensor | None, forget: Tensor | None, factors: Tensor, is_finite: Tensor) -> Tensor | None:
    pairs = zip((retain, forget), factors.unbind(), strict=True)
    terms = [_scaled(grad, factor, is_finite) for grad, factor in pairs if grad is not None]
    if not terms:
        return None
    if len(terms) == 2 and terms[0].is_sparse:
        terms.reverse()  # torch adds a sparse tensor to a dense one, not the other way round
    total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    return total.to(next(g.dtype for g in (retain, forget) if g is not None))


def _scaled(grad: Tensor, factor: Tensor, is_finite: Tensor) -> Tensor:
    if grad.is_sparse:
        grad = grad.coalesce()
        values = _scaled(grad.values(), factor, is_finite)
        return torch.sparse_coo_tensor(grad.indices(), values, grad.shape, is_coalesced=True, check_invariants=False)
    wide = torch.promote_types(grad.dtype, torch.float32)
    return torch.where(is_finite, grad.to(wide) * factor.to(wide), 0)
