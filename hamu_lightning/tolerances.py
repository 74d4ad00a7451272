"""How exactly the numbers of a step are known: what the rules count as feasible and as parallel.

A solver that decides the same questions takes the same numbers: then it agrees with the closed form where both apply.
"""

from __future__ import annotations

import torch

__all__ = ["CAPACITY_SLACK", "SMALLEST_SINE", "compute_rounding"]

CAPACITY_SLACK = 1e-9
"""A quota that exceeds the capacity by no more than this share of it is feasible: it is rounding."""
SMALLEST_SINE = 1e-5
"""Where the sine of the angle is smaller, `c_r g_r` and `c_f g_f` cancel so far that even float64 misses the quota by
more than 1e-10 of the capacity. Counting as collinear gives up at most this share of the step."""
# |p|^2 / |g_r|^2 is known to this many roundings of the Gramian's own dtype: each of its three sums is off by a few.
_ROUNDINGS = 16


def compute_rounding(dtype: torch.dtype) -> float:
    """Return how far `|p|^2 / |g_r|^2` may be off, for the part `p` of `g_r` that is orthogonal to `g_f`.

    Args:
        dtype: That of the Gramian from which it is computed.

    Returns:
        A share of `|g_r|^2`: gradients with less between them count as collinear.

    Example:
        >>> compute_rounding(torch.float64) < SMALLEST_SINE**2 < compute_rounding(torch.float32)
        True
    """
    return _ROUNDINGS * torch.finfo(dtype).eps
