"""The one pass that writes `a g_r + b g_f + ...`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hamu_lightning.gramian import compute_gramian


def combine_(
    gradients: Sequence[Sequence[Tensor | None]], factors: Tensor, blocks: Sequence[int], is_finite: Tensor
) -> tuple[list[Tensor | None], Tensor]:
    """Combine lists of gradients tensor by tensor, writing over the gradients of the last list.

    Sums are taken in float32 or wider. A result can be too large for float16: then none of them is finite. A factor may
    be larger than the gradients' own type can hold (those of a confident model are tiny): it is applied in two halves,
    and where not even these fit, nothing is finite.

    Args:
        gradients: `n` lists of `T` gradients. The memory of the last list takes the result, the others stay as they
            are.
        factors: `[B, n]`, what the gradients of each block are multiplied by.
        blocks: For each tensor the index of its block.
        is_finite: 0-d, bool. Where it is False the result is zero, whatever the gradients hold.

    Returns:
        For each tensor the combined gradient, or None where all are None; and whether they are finite, 0-d, bool.
    """
    combined: list[Tensor | None] = []
    usual: list[tuple[Tensor, ...]] = []
    weights: list[tuple[Tensor, ...]] = []
    scales, factors = _halve(factors)
    is_finite = is_finite & factors.float().isfinite().all() & scales.float().isfinite().all()
    halves: list[Tensor] = []
    cells = [*zip(*(column.unbind() for column in factors.unbind(dim=1)), strict=True)]
    rest = scales.unbind()
    for row, block in zip(zip(*gradients, strict=True), blocks, strict=True):
        if all(map(_is_usual, row)):
            usual.append(row)
            weights.append(cells[block])
            halves.append(rest[block])
            combined.append(row[-1])
        else:
            combined.append(_combine_one(row, cells[block], rest[block], is_finite))
    if usual:
        _combine_lists_([*zip(*usual, strict=True)], [*zip(*weights, strict=True)], tuple(halves), is_finite)
    narrow = [grad for grad in combined if grad is not None and grad.dtype is torch.float16]
    if not narrow:
        return combined, is_finite
    is_finite = is_finite & compute_gramian(narrow).isfinite().all()
    one = torch.ones_like(factors[0, 0])
    return [None if grad is None else _scaled(grad, one, is_finite).to(grad.dtype) for grad in combined], is_finite


def add_up(
    first: Sequence[Tensor | None],
    others: Iterable[list[Tensor | None]],
    factors: Tensor,
    blocks: Sequence[int],
    is_finite: Tensor,
) -> tuple[list[Tensor | None], Tensor]:
    """The same for gradients that come one after the other; the first one stays as it is, the others may be used up."""
    one = torch.ones_like(factors[:, 0])
    alone = torch.stack((factors[:, 0], torch.zeros_like(one)), dim=1)
    total, is_finite = combine_([first, [None if g is None else g.clone() for g in first]], alone, blocks, is_finite)
    for index, grads in enumerate(others, start=1):
        total, is_finite = combine_([total, grads], torch.stack((one, factors[:, index]), dim=1), blocks, is_finite)
    return total, is_finite


def _halve(factors: Tensor) -> tuple[Tensor, Tensor]:
    """Factors `[B, n]` as products of a scale `[B]` and a rest: powers of two, so that nothing is rounded.

    Of large factors each takes half of the exponent; up to 2 the scale is 1.
    """
    exponent = factors.abs().amax(dim=1).log2() / 2
    scales = torch.exp2(exponent.clamp(min=0).floor())
    return scales, factors / scales.unsqueeze(1)


def _combine_lists_(
    columns: Sequence[tuple[Tensor, ...]],
    weights: Sequence[tuple[Tensor, ...]],
    scales: tuple[Tensor, ...],
    is_finite: Tensor,
) -> None:
    """Write the combinations over the last list, with torch's operators on whole lists."""
    *sources, targets = columns
    *others, last = weights
    torch._foreach_mul_(targets, last)
    for source, weight in zip(sources, others, strict=True):
        torch._foreach_addcmul_(targets, source, weight)  # without a product of the model's size in between
    torch._foreach_mul_(targets, scales)
    is_bad = ~is_finite
    for target in targets:
        target.masked_fill_(is_bad, 0)


def _is_usual(grad: Tensor | None) -> bool:
    """Whether torch's operators on whole lists take the gradient; 16-bit sums would lose the quota to cancellation."""
    return type(grad) is Tensor and grad.layout is torch.strided and grad.dtype in (torch.float32, torch.float64)


def _combine_one(
    row: Sequence[Tensor | None], factors: Sequence[Tensor], scale: Tensor, is_finite: Tensor
) -> Tensor | None:
    terms = [_scaled(g, f, is_finite) for g, f in zip(row, factors, strict=True) if g is not None]
    if not terms:
        return None
    terms.sort(key=lambda term: term.is_sparse)  # torch adds a sparse tensor to a dense one, not the other way round
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return _scaled(total, scale, is_finite).to(next(grad.dtype for grad in row if grad is not None))


def _scaled(grad: Tensor, factor: Tensor, is_finite: Tensor) -> Tensor:
    if grad.is_sparse:
        grad = grad.coalesce()
        values = _scaled(grad.values(), factor, is_finite)
        return torch.sparse_coo_tensor(grad.indices(), values, grad.shape, is_coalesced=True, check_invariants=False)
    wide = torch.promote_types(grad.dtype, torch.float32)
    return torch.where(is_finite, grad.to(wide) * factor.to(wide), 0)
