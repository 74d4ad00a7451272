"""Searches for one unknown in [0, 1] that all blocks share.

Where the numbers are in host memory, interpolation in a bracket: 7 to 15 evaluations mostly. On other devices, and
under FakeTensorMode, a fixed number of vectorised rounds that read nothing on the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Each round evaluates this many points at once and keeps the interval around the answer.
_POINTS = 64
# The interval shrinks by 31 (minimum) or 63 (root) a round: to 4e-11 and 3e-15 of its length.
_MINIMUM_ROUNDS = 7
_ROOT_ROUNDS = 8
# Where the function jumps, or is flat, the bracket is halved: this often, to an ulp of 1 with some to spare.
_MOST = 100
_ULP = torch.finfo(torch.float64).eps


def minimise_convex(function: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], *, like: Tensor) -> Tensor:
    """Return the minimum on [0, 1] of a convex `function` from points `[P]` to values `[P]`, 0-d.

    Args:
        function: The function.
        slope: Its derivative, or any function with the sign of it.
        like: A tensor on the device.
    """
    if is_on_host(like):
        return function(like.new_tensor([0.0, *interpolate(lambda t: slope(like.new_tensor([t])).tolist()[0])])).min()
    left, right = like.new_zeros(()), like.new_ones(())
    for _ in range(_MINIMUM_ROUNDS):
        points = _spread(left, right)
        values = function(points)
        lowest = values.argmin()
        left, right = _pick(points, lowest - 1), _pick(points, lowest + 1)
    return values.min()


def bracket_root(
    function: Callable[[Tensor], Tensor],
    target: Tensor,
    excess_on_host: Callable[[float], tuple[Callable[[float], float], float]],
) -> Tensor:
    """Return the neighbours in [0, 1], `[2]`, between which an increasing function passes `target`; or itself, `[1]`.

    Where it is at or above the target from the start, both are near 0; where it never reaches it, the right one is 1.

    Args:
        function: From points `[P]` to values `[P]`.
        target: 0-d.
        excess_on_host: For a target the function less that, for numbers in host memory, and what it is known to.
    """
    if is_on_host(target):
        return target.new_tensor(sorted({*interpolate(*excess_on_host(read(target)))}))
    left, right = target.new_zeros(()), target.new_ones(())
    for _ in range(_ROOT_ROUNDS):
        points = _spread(left, right)
        first_above = (function(points) < target).sum()
        left, right = _pick(points, first_above - 1), _pick(points, first_above)
    return torch.stack((left, right))


def is_on_host(tensor: Tensor) -> bool:
    """Whether numbers are in host memory, where looking at one waits for nobody, and none of them is fake."""
    return type(tensor) is Tensor and tensor.is_cpu and not torch.compiler.is_compiling()


def read(number: Tensor) -> float:
    """A 0-d tensor in host memory as a number."""
    return float(number.reshape(1).tolist()[0])


def interpolate(function: Callable[[float], float], noise: float = 0.0) -> tuple[float, float]:
    """Return two neighbours in [0, 1] between which an increasing function passes 0: Chandrupatla's method.

    Inverse quadratic interpolation where the last three points look like a smooth function, else halving (Chandrupatla
    1997, Advances in Engineering Software 28). Both are 0 where it begins at 0 or above, and 1 where it ends below.

    Args:
        function: The function.
        noise: What its values are known to: one that is no larger is as good as 0, and both are its place.
    """
    a, b = 1.0, 0.0
    at_a, at_b = function(a), function(b)
    if at_b >= 0:
        return 0.0, 0.0
    if not at_a > 0:
        return 1.0, 1.0
    share = 0.5
    for _ in range(_MOST):
        x = a + share * (b - a)
        at_x = function(x)
        # The new point replaces the end on its side; c is the one before.
        if (at_x > 0) == (at_a > 0):
            c, at_c = a, at_a
        else:
            c, at_c, b, at_b = b, at_b, a, at_a
        a, at_a = x, at_x
        if abs(at_a) <= noise:
            return a, a
        best = a if abs(at_a) < abs(at_b) else b
        least = _ULP * max(best, _ULP) / abs(b - a)
        if least >= 0.5:
            break
        share = min(1 - least, max(least, _propose(a, b, c, at_a, at_b, at_c)))
    return min(a, b), max(a, b)


def _propose(a: float, b: float, c: float, at_a: float, at_b: float, at_c: float) -> float:
    """Where to look next, as a share of the way from a to b."""
    place, level = (a - b) / (c - b), (at_a - at_b) / (at_c - at_b)
    if not (level * level < place and (1 - level) * (1 - level) < 1 - place):
        return 0.5
    steep = at_a / (at_b - at_a) * at_c / (at_b - at_c)
    return steep + (c - a) / (b - a) * at_a / (at_c - at_a) * at_b / (at_c - at_b)


def _spread(left: Tensor, right: Tensor) -> Tensor:
    fractions = torch.linspace(0, 1, _POINTS, dtype=left.dtype, device=left.device)
    # The right end is taken as it is: rounding must not lose the 1.
    return torch.where(fractions < 1, left + (right - left) * fractions, right)


def _pick(points: Tensor, index: Tensor) -> Tensor:
    # Indexing with a 0-d tensor would read it on the host; selecting does not.
    return points.index_select(0, index.clamp(0, _POINTS - 1).view(1)).squeeze(0)
