"""Searches for one unknown in [0, 1] that all blocks share: a fixed number of vectorised rounds, no host reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Each round evaluates this many points at once and keeps the interval around the answer.
_POINTS = 64
# The interval shrinks by 31 (minimum) or 63 (root) a round: to 4e-11 and 3e-15 of its length.
_MINIMUM_ROUNDS = 7
_ROOT_ROUNDS = 8


def minimise_convex(function: Callable[[Tensor], Tensor], *, like: Tensor) -> Tensor:
    """Return the minimum on [0, 1] of a convex `function` from points `[P]` to values `[P]`, 0-d."""
    left, right = like.new_zeros(()), like.new_ones(())
    for _ in range(_MINIMUM_ROUNDS):
        points = _spread(left, right)
        values = function(points)
        lowest = values.argmin()
        left, right = _pick(points, lowest - 1), _pick(points, lowest + 1)
    return values.min()


def bracket_root(function: Callable[[Tensor], Tensor], target: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return two neighbours in [0, 1], 0-d each, between which the increasing `function` passes `target`.

    Where it is at or above the target from the start, both are near 0; where it never reaches it, the right one is 1.
    """
    left, right = like.new_zeros(()), like.new_ones(())
    for _ in range(_ROOT_ROUNDS):
        points = _spread(left, right)
        first_above = (function(points) < target).sum()
        left, right = _pick(points, first_above - 1), _pick(points, first_above)
    return left, right


def _spread(left: Tensor, right: Tensor) -> Tensor:
    fractions = torch.linspace(0, 1, _POINTS, dtype=left.dtype, device=left.device)
    # The right end is taken as it is: rounding must not lose the 1.
    return torch.where(fractions < 1, left + (right - left) * fractions, right)


def _pick(points: Tensor, index: Tensor) -> Tensor:
    # Indexing with a 0-d tensor would read it on the host; selecting does not.
    return points.index_select(0, index.clamp(0, _POINTS - 1).view(1)).squeeze(0)
