"""A step for two gradients in host memory: the Gramians in one pass, and the update in another.

The general way (`gramian.py`, `_combine.py`) takes any number of gradients of any kind, on any device, and reads
nothing on the host. Here the numbers are there anyway. What depends on the shapes alone is found out once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from typing_extensions import override

from hamu_lightning.gramian import compute_gramian
from hamu_lightning.optim._checks import is_plain_sgd
from hamu_lightning.optim._gradients import StepGradients
from hamu_lightning.optim._layout import Layout

# Tensors of fewer elements are put one after the other and multiplied in float64.
_SMALL = 2_048
# From here on a tensor is read in pieces that stay in the cache, of rows that are summed in float32; those between are
# multiplied side by side.
_LARGE = 2**16
_PIECE = 2**16
_ROW = 2_048
# Where float32 sums would not do, they are taken again in float64: gradients with a smaller sin^2 between them, and
# squares near the ends of float32, on average.
_NARROW = 1e-3
_LEAST, _MOST = 1e-30, 1e30

_Array = NDArray[np.float64]
_is_sparse = attrgetter("is_sparse")


@dataclass(frozen=True, eq=False)
class HostGradients(StepGradients):
    """The gradients of a step for two groups that a `HostPlan` takes.

    Args:
        plan: What is known of their shapes.
    """

    plan: HostPlan
    _flat: list[NDArray[np.float32]] = field(default_factory=list)

    @property
    def _both(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        retain: Any
        forget: Any
        retain, forget = self.lists  # none of them is None: the plan takes no others
        return retain, forget

    @override
    def multiply(self) -> Tensor:
        retain, forget = self._both
        gramian, flat = self.plan.multiply(retain, forget)
        self._flat[:] = [flat]
        return gramian

    def move_(self, values: Tensor, lr: Tensor) -> bool:
        """Add `c_r g_r + c_f g_f` to the weights; the gradients stay as they are.

        Args:
            values: `[B, 2]`, what the mean gradients are multiplied by; all zero where they are not finite.
            lr: `[B]`, learning rates: where one is 0, nothing moves.

        Returns:
            Whether it was done: not where float32 does not hold what the base would multiply the gradients by.
        """
        rate = lr.numpy()[:, None]
        factors = np.where(rate == 0, 0, self._as_means(values).numpy())
        with np.errstate(over="ignore"):
            largest = np.abs(factors / np.where(rate == 0, 1, rate)).max()
        if not max(largest, np.abs(factors).max()) < np.finfo(np.float32).max:
            return False
        if factors.any():  # not where a number is not finite: 0 x NaN
            self.plan.add_(*self._both, self._flat[0], factors)
        return True


class HostPlan:
    """How the tensors of a layout are multiplied and moved.

    Sums over tensors of 2,048 elements and more are taken in float32, in parts, and in float64 from there on; all
    others in float64. They are off by 2e-7 of `|g_r| |g_f|` at most (docs/method.md#numerics). Where that would show,
    they are taken in float64 too.

    Args:
        layout: The tensors, all float32 in host memory.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        sizes = [p.numel() for p in layout.parameters]
        self._sizes = np.array(sizes)
        self._blocks = np.array(layout.blocks)
        self._is_own = layout.blocks == tuple(range(len(layout.labels)))
        self._small = [i for i, n in enumerate(sizes) if 0 < n < _SMALL]
        self._middle = _pack_equal([(i, n) for i, n in enumerate(sizes) if _SMALL <= n < _LARGE])
        self._large = [i for i, n in enumerate(sizes) if n >= _LARGE]
        self._others = np.array([i for i, n in enumerate(sizes) if n >= _SMALL], dtype=int)
        self._pick_small: Callable[[Sequence[Any]], Sequence[Any]] = _picker(self._small)
        self._small_sizes = self._sizes[self._small]
        self._starts = np.cumsum(self._small_sizes) - self._small_sizes
        self._small_weights: tuple[Tensor, ...] = tuple(self._pick_small(layout.parameters))
        update = torch.zeros(int(self._small_sizes.sum()))
        self._update = update.numpy()
        # Views of one memory: the small tensors are moved in one call.
        self._updates: tuple[Tensor, ...] = ()
        if self._small:
            self._updates = _unflatten_dense_tensors(update, self._small_weights)  # type: ignore[no-untyped-call]

    def takes(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether the gradients are of the usual kind; torch lets none have another dtype or shape than its weight."""
        return {*map(type, grads)} == {Tensor} and not any(map(_is_sparse, grads))

    def multiply(self, retain: Sequence[Tensor], forget: Sequence[Tensor]) -> tuple[Tensor, NDArray[np.float32]]:
        """Compute the Gramians `[B, 2, 2]`; return them, and the small gradients one after the other, `[2, S]`."""
        products = np.zeros((3, len(self._sizes)))  # rr, rf, ff
        flat = self._multiply_small(retain, forget, products)
        if len(self._others):
            self._multiply_others(retain, forget, products)
        if not self._is_own:
            products = np.stack([np.bincount(self._blocks, row, len(self.layout.labels)) for row in products])
        gramian = products[[0, 1, 1, 2]].T.reshape(-1, 2, 2)
        return torch.from_numpy(np.ascontiguousarray(gramian)), flat

    def _multiply_small(
        self, retain: Sequence[Tensor], forget: Sequence[Tensor], products: _Array
    ) -> NDArray[np.float32]:
        if not self._small:
            return np.empty((2, 0), np.float32)
        flat: NDArray[np.float32] = _flatten(self._pick_small(retain), self._pick_small(forget))
        wide = flat.astype(np.float64)
        with np.errstate(all="ignore"):  # what is not finite is found in the sums
            for row, (a, b) in zip(products, _pairs(*wide), strict=True):
                row[self._small] = np.add.reduceat(a * b, self._starts)
        return flat

    def _multiply_others(self, retain: Sequence[Tensor], forget: Sequence[Tensor], products: _Array) -> None:
        for pick, indices, count in self._middle:
            flat = torch.from_numpy(_flatten(pick(retain), pick(forget))).view(2, len(indices), count)
            products[:, indices] = torch.stack([(a * b).sum(1) for a, b in _pairs(*flat)]).numpy()
        for i in self._large:
            if retain[i].is_contiguous() and forget[i].is_contiguous():
                products[:, i] = _multiply_pieces(retain[i].view(-1).numpy(), forget[i].view(-1).numpy())
            else:
                products[:, i] = np.nan  # which is no sum that would do
        again = self._others[_is_inexact(products[:, self._others], self._sizes[self._others])]
        if len(again):
            exact = compute_gramian([retain[i] for i in again], [forget[i] for i in again]).numpy()
            products[:, again] = exact[:, [0, 0, 1], [0, 1, 1]].T

    def add_(
        self, retain: Sequence[Tensor], forget: Sequence[Tensor], flat: NDArray[np.float32], factors: _Array
    ) -> None:
        """Add multiples of both gradients to the weights.

        Args:
            retain: Gradients.
            forget: Gradients.
            flat: The small ones, as `multiply` returned them.
            factors: `[B, 2]`.
        """
        by_tensor = factors if self._is_own else factors[self._blocks]
        for i, (a, b) in zip(self._others.tolist(), by_tensor[self._others].tolist(), strict=True):
            if a:
                self.layout.parameters[i].add_(retain[i], alpha=a)
            if b:
                self.layout.parameters[i].add_(forget[i], alpha=b)
        if self._small:
            a, b = by_tensor[self._small].astype(np.float32).T
            np.multiply(flat[0], np.repeat(a, self._small_sizes), out=self._update)
            self._update += flat[1] * np.repeat(b, self._small_sizes)
            torch._foreach_add_(self._small_weights, self._updates)


def make_host_plan(layout: Layout) -> HostPlan | None:
    """Plan steps where all weights are float32 in host memory; else None: they go the general way."""
    usual = (Tensor, nn.Parameter)
    is_usual = all(type(p) in usual and p.dtype is torch.float32 and p.is_cpu for p in layout.parameters)
    return HostPlan(layout) if is_usual else None


def can_move_directly(optimizer: Optimizer) -> bool:
    """Whether adding `-lr` times the gradient is all that the optimizer would do."""
    hooks = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    step = vars(optimizer).get("step")  # schedulers put a function there that notes the call
    is_own = step is None or hasattr(step, "_wrapped_by_lr_sched")
    return is_plain_sgd(optimizer) and is_own and not any((*hooks, *own)) and _is_of_torch(type(optimizer).step)


def _is_of_torch(step: Any) -> bool:
    """Whether a function is torch's, and all that is wrapped around it: people patch `SGD.step` to see each step."""
    while step is not None:
        if getattr(step, "__globals__", {}).get("__name__", "").partition(".")[0] != "torch":
            return False
        step = getattr(step, "__wrapped__", None)
    return True


def _pack_equal(tensors: Sequence[tuple[int, int]]) -> list[tuple[Callable[[Sequence[Any]], Any], list[int], int]]:
    """Tensors of one size, as many as `_LARGE` elements hold: what picks them, their indices, and their size."""
    by_size: dict[int, list[int]] = {}
    for index, count in tensors:
        by_size.setdefault(count, []).append(index)
    packs = [
        (indices[start : start + _LARGE // count], count)
        for count, indices in by_size.items()
        for start in range(0, len(indices), _LARGE // count)
    ]
    return [(_picker(indices), indices, count) for indices, count in packs]


def _picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], Any]:
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda values: tuple(values[i] for i in indices)


def _flatten(retain: Sequence[Tensor], forget: Sequence[Tensor]) -> NDArray[np.float32]:
    """Gradients one after the other, those of retain first: `[2, S]`."""
    flat: Tensor = _flatten_dense_tensors((*retain, *forget))  # type: ignore[no-untyped-call]
    return flat.numpy().reshape(2, -1)


def _pairs(retain: Any, forget: Any) -> tuple[tuple[Any, Any], ...]:
    return (retain, retain), (retain, forget), (forget, forget)


def _multiply_pieces(retain: NDArray[np.float32], forget: NDArray[np.float32]) -> _Array:
    """`rr`, `rf`, `ff` of two vectors: rows are summed in float32, and what comes out in float64."""
    total, whole = np.zeros(3), retain.size - retain.size % _ROW
    with np.errstate(all="ignore"):  # what is not finite is found in the sums
        for start in range(0, whole, _PIECE):
            piece = slice(start, min(start + _PIECE, whole))
            a, b = retain[piece].reshape(-1, _ROW), forget[piece].reshape(-1, _ROW)
            total += [_dot(x, y).sum(dtype=np.float64) for x, y in _pairs(a, b)]
        a, b = retain[whole:].astype(np.float64), forget[whole:].astype(np.float64)
        total += [x @ y for x, y in _pairs(a, b)]
    return total


def _multiply_rows(retain: NDArray[np.float32], forget: NDArray[np.float32]) -> NDArray[np.float32]:
    products: NDArray[np.float32] = (retain * forget).sum(-1)
    return products


# numpy has it since version 2.
_dot: Callable[..., NDArray[np.float32]] = getattr(np, "vecdot", _multiply_rows)


def _is_inexact(products: _Array, sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """For each tensor whether `rr`, `rf`, `ff` `[3, T]` have to be known better than float32 sums tell."""
    rr, rf, ff = products
    with np.errstate(all="ignore"):
        cosine = rf / np.sqrt(rr) / np.sqrt(ff)
        is_fine = (1 - cosine * cosine >= _NARROW) & (np.maximum(rr, ff) <= _MOST)
        is_fine &= np.minimum(rr, ff) >= sizes * _LEAST
    found: NDArray[np.bool_] = ~is_fine
    return found
