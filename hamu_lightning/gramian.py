"""Blocks of weights, and the Gramians of two or more gradients per block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from hamu_lightning.checks import check_count, describe
from hamu_lightning.errors import HAMUValueError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Blocks", "assign_blocks", "check_blocks", "compute_gramian", "widest_float"]

Blocks: TypeAlias = Literal["tensor", "layer", "global"] | Callable[[str], str]

# Gradients are widened to float64 piece by piece: so many elements of all gradients together fit the second-level cache
# of a processor core, and a model's largest tensor is never copied whole. An accelerator has the memory, and wants few
# kernels.
_PIECE_ON_CPU = 2**18
_PIECE_ON_ACCELERATOR = 2**25


@torch.no_grad()
def compute_gramian(*grads: Sequence[Tensor | None], blocks: Sequence[int] | None = None) -> Tensor:
    """Compute the inner products of several gradients, block by block.

    `K[b, i, j]` is the sum over the tensors of block `b` of the inner products of the gradients `i` and `j`. Sums are
    taken in float64 (float32 on a device that has none), whatever the dtype of the gradients: where they are nearly
    parallel, the rule lives on the last digits of these numbers. Nothing is read on the host. (Coalescing a sparse
    gradient is the exception that torch makes on CUDA.)

    Args:
        *grads: One list of gradients per objective, all with the same tensors in the same order. `None` counts as
            zero. Sparse gradients and `DTensor` are understood: the local shards are multiplied, and the numbers of
            all tensors are summed in one collective per mesh dimension that shards any of them.
        blocks: For each tensor the index of its block, `0 .. B-1`. Default: each tensor is its own block.

    Returns:
        `[B, n, n]` for `n` gradients, symmetric, float64. Unit: squared loss per squared unit of weight.

    Raises:
        HAMUValueError: If the lists have different lengths, or `blocks` does not name each tensor's block.

    Example:
        >>> import torch
        >>> compute_gramian([torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 0.0])])
        tensor([[[25.,  3.],
                 [ 3.,  1.]]], dtype=torch.float64)
    """
    _check_lists(grads, blocks)
    n, n_tensors = len(grads), len(grads[0])
    rows = list(zip(*grads, strict=True))
    first = [next((g for g in row if g is not None), None) for row in rows]
    for row, tensor in zip(rows, first, strict=True):
        if any(g is not None and (not isinstance(g, Tensor) or g.shape != tensor.shape) for g in row):  # type: ignore[union-attr]
            raise HAMUValueError(
                "Expected the gradients of one tensor to be tensors of its shape, or None, but got "
                f"{', '.join(map(describe, row))}."
            )
    device = next((g.device for g in first if g is not None), torch.device("cpu"))
    is_sharded = any(g is not None and _mesh(g) is not None for g in first)
    keys = range(n_tensors) if blocks is None or is_sharded else blocks  # shards are summed tensor by tensor
    products = _multiply(rows, keys, device)
    zero = torch.zeros(n, n, dtype=widest_float(device), device=device)
    gramian = torch.stack([products.get(key, zero) for key in range(max(keys) + 1)]) if rows else zero[None][:0]
    if is_sharded:
        gramian = _sum_over_shards(gramian, first)
        if blocks is not None:
            index = torch.tensor(blocks, dtype=torch.long, device=device)
            gramian = zero.new_zeros(max(blocks) + 1, n, n).index_add_(0, index, gramian)
    return gramian.triu() + gramian.triu(1).mT


def assign_blocks(names: Sequence[str], groups: Sequence[int], blocks: Blocks) -> tuple[list[int], list[str]]:
    """Assign each tensor to a block. Blocks are split at the borders of parameter groups, so that each has one `lr`.

    Args:
        names: The tensors' names, as in `module.named_parameters()`.
        groups: For each tensor the index of its parameter group.
        blocks: "tensor" (each its own), "layer" (the module that owns the tensor), "global" (all of them together),
            or a function from a tensor's name to the label of its block.

    Returns:
        For each tensor the index of its block, and for each block its label.

    Raises:
        HAMUValueError: If `blocks` is none of these.

    Example:
        >>> assign_blocks(["a.weight", "a.bias", "b.weight"], [0, 0, 0], "layer")
        ([0, 0, 1], ['a', 'b'])
        >>> assign_blocks(["a.weight", "b.weight"], [0, 1], "global")
        ([0, 1], ['global/group0', 'global/group1'])
    """
    label_of = _label_function(blocks)
    keys = [(label_of(name), group) for name, group in zip(names, groups, strict=True)]
    order = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    groups_of: dict[str, set[int]] = {}
    for label, group in keys:
        groups_of.setdefault(label, set()).add(group)
    labels = [label if len(groups_of[label]) == 1 else f"{label}/group{group}" for label, group in order]
    return [order[key] for key in keys], labels


def check_blocks(blocks: Blocks) -> None:
    """Raise unless `blocks` is one of its choices, by asking for the block of a tensor.

    Args:
        blocks: As for `assign_blocks`.

    Raises:
        HAMUValueError: If it is none of them.
    """
    assign_blocks(["layer.weight"], [0], blocks)


def widest_float(device: torch.device) -> torch.dtype:
    """Return the dtype that sums over weights are taken in: float64, or float32 on a device that has none.

    Example:
        >>> widest_float(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


def _check_lists(grads: Sequence[Sequence[Tensor | None]], blocks: Sequence[int] | None) -> None:
    lists = [grad if isinstance(grad, list | tuple) else None for grad in grads]
    lengths = [None if grad is None else len(grad) for grad in lists]
    if not grads or None in lengths or len(set(lengths)) > 1:
        raise HAMUValueError(
            f"Expected `grads` to be lists of equal length, but got lengths {lengths}. "
            "Give one list per objective, with None where a tensor has no gradient."
        )
    if blocks is None:
        return
    if not isinstance(blocks, Sequence) or len(blocks) != lengths[0]:
        raise HAMUValueError(
            f"Expected `blocks` to hold one index per tensor ({lengths[0]}), but got {describe(blocks)}."
        )
    for index in set(blocks):
        check_count("blocks", index, least=0)


def _label_function(blocks: Blocks) -> Callable[[str], str]:
    if callable(blocks) and not isinstance(blocks, type):
        return blocks
    match blocks:
        case "tensor":
            return lambda name: name
        case "layer":
            return lambda name: name.rpartition(".")[0] or name
        case "global":
            return lambda name: "global"
    raise HAMUValueError(
        f"Expected `blocks` to be 'tensor', 'layer', 'global' or a function from a name to a label, but got "
        f"{describe(blocks)}."
    )


def _multiply(rows: Sequence[Sequence[Tensor | None]], keys: Sequence[int], device: torch.device) -> dict[int, Tensor]:
    """The Gramians `[n, n]` of the rows' local parts, summed over the rows of each key. A row of None has none."""
    found: list[tuple[int, Tensor]] = []
    dense: list[tuple[int, list[Tensor]]] = []
    for key, row in zip(keys, rows, strict=True):
        if all(map(_is_plain, row)):  # nearly always, and all that follows takes as long as the products
            dense.append((key, [g if g.ndim == 1 else g.view(-1) for g in row if g is not None]))
            continue
        local = [None if g is None else _local(g) for g in row]
        present = [g for g in local if g is not None]
        if any(g.is_sparse for g in present):
            product = torch.stack([_sparse_inner(a, b, device) for a in local for b in local])
            found.append((key, product.view(len(row), len(row))))
        elif present:
            if len(present) < len(local):  # a missing gradient is zero
                local = [torch.zeros_like(present[0]) if g is None else g for g in local]
            dense.append((key, _flatten([g for g in local if g is not None])))
    products: dict[int, Tensor] = {}
    for key, product in chain(found, _multiply_dense(dense)):
        product = product.to(device)
        products[key] = products[key] + product if key in products else product
    return products


def _multiply_dense(dense: Sequence[tuple[int, list[Tensor]]]) -> Iterator[tuple[int, Tensor]]:
    """The same for vectors, not summed, piece by piece in the same memory: new memory takes longer than products."""
    memory: dict[torch.device, Tensor] = {}
    most = sum(len(row) * row[0].numel() for _, row in dense)
    for pack in _pack(dense):
        keys, parts = zip(*pack, strict=True)
        n, sizes, device = len(parts[0]), [part[0].numel() for part in parts], parts[0][0].device
        if device not in memory:
            size = min(most, max(_piece_on(device), n))
            memory[device] = torch.empty(size, dtype=widest_float(device), device=device)
        wide = memory[device][: n * sum(sizes)].view(n, -1)
        if len(parts) == 1:
            torch._foreach_copy_(wide.unbind(), parts[0])
        else:  # `torch.cat(..., out=wide)` would convert tensor by tensor: five times as slow
            wide.copy_(torch.cat([part[k] for k in range(n) for part in parts]).view(n, -1))
        # Many small products take longer than a large one: neighbours of one key are multiplied together.
        runs = [
            (key, sum(size for _, size in run)) for key, run in groupby(zip(keys, sizes, strict=True), itemgetter(0))
        ]
        for (key, _), piece in zip(runs, wide.split_with_sizes([size for _, size in runs], dim=1), strict=True):
            yield key, piece @ piece.T


def _pack(dense: Sequence[tuple[int, list[Tensor]]]) -> Iterator[list[tuple[int, list[Tensor]]]]:
    """Cut large tensors, and put small ones of one device together, so that each pack has about one piece's length."""
    pack: list[tuple[int, list[Tensor]]] = []
    room, device = 0, None
    for key, row in dense:
        count, here = row[0].numel(), row[0].device
        piece = max(_piece_on(here) // len(row), 1)
        for start in range(0, count, piece):
            length = min(piece, count - start)
            if pack and (length > room or here != device):
                yield pack
                pack = []
            room, device = (room if pack else piece) - length, here
            pack.append((key, row if length == count else [g[start : start + length] for g in row]))
    if pack:
        yield pack


def _piece_on(device: torch.device) -> int:
    return _PIECE_ON_CPU if device.type == "cpu" else _PIECE_ON_ACCELERATOR


def _is_plain(grad: Tensor | None) -> bool:
    return type(grad) is Tensor and grad.layout is torch.strided and grad.is_contiguous() and not grad.is_complex()


def _flatten(row: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of one tensor as vectors, all in the same order of elements.

    Convolutions give gradients whose channels come last in memory: these are read in that order. A copy in the usual
    one takes longer than the products.
    """
    real = [torch.view_as_real(grad) if grad.is_complex() else grad for grad in row]
    if not all(grad.is_contiguous() for grad in real):
        order = sorted(range(real[0].ndim), key=real[0].stride, reverse=True)
        permuted = [grad.permute(order) for grad in real]
        real = permuted if all(grad.is_contiguous() for grad in permuted) else real
    return [grad.reshape(-1) for grad in real]


def _sparse_inner(a: Tensor | None, b: Tensor | None, device: torch.device) -> Tensor:
    wide = widest_float(device)
    if a is None or b is None:
        return torch.zeros((), dtype=wide, device=device)
    if not a.is_sparse:
        a, b = b, a
    if not a.is_sparse:
        return (a.to(wide) * b.to(wide)).sum()
    a = a.coalesce()
    if b.is_sparse:
        return (a.to(wide) * b.coalesce().to(wide)).coalesce().values().sum()
    return (a.values().to(wide) * b[tuple(a.indices())].to(wide)).sum()


def _local(grad: Tensor) -> Tensor:
    """The shard of a `DTensor` on this rank; any other tensor as it is."""
    mesh = _mesh(grad)
    if mesh is None:
        return grad
    if any(placement.is_partial() for placement in grad.placements):  # type: ignore[attr-defined]
        from torch.distributed.tensor import Replicate

        placements = [Replicate() if p.is_partial() else p for p in grad.placements]  # type: ignore[attr-defined]
        grad = grad.redistribute(mesh, placements)  # type: ignore[attr-defined]
    return grad.to_local()  # type: ignore[attr-defined, no-any-return]


def _mesh(grad: Tensor) -> DeviceMesh | None:
    return getattr(grad, "device_mesh", None)


def _sum_over_shards(products: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
    """Sum the rows of sharded tensors over exactly the mesh dimensions that shard them.

    Args:
        products: `[T, n, n]`, this rank's Gramian for each tensor.
        tensors: For each row one of its gradients, or None.
    """
    mesh_of = [None if t is None else _mesh(t) for t in tensors]
    for mesh in dict.fromkeys(m for m in mesh_of if m is not None):
        rows = [row for row, m in enumerate(mesh_of) if m == mesh]
        index = torch.tensor(rows, device=products.device)
        part = products[index]
        for dim in range(mesh.ndim):
            is_sharded = [tensors[row].placements[dim].is_shard() for row in rows]  # type: ignore[union-attr]
            if not any(is_sharded):
                continue
            # One collective for all tensors: those that this dimension does not shard are the same on all its ranks,
            # and only the first rank contributes them.
            if mesh.get_local_rank(dim) != 0:
                part = torch.where(
                    torch.tensor(is_sharded, device=part.device)[:, None, None], part, torch.zeros_like(part)
                )
            torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        products = products.index_copy(0, index, part)
    return products
