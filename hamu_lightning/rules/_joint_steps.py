"""The steps of all blocks at one exchange rate between the objectives (docs/method.md#allocations, eq. 5.7)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hamu_lightning.rules._closed_form import BlockProblem, safe_divide

_EPSILON, _TINY = np.finfo(np.float64).eps, np.finfo(np.float64).tiny


class JointSteps:
    """For an exchange rate `t` in [0, 1] the step `d_b = -R_b v_b/|v_b|`, `v = (1-t) g_r/s_r - t g_f/s_f`.

    Args:
        problem: The blocks; `s_r`, `s_f` are the norms of the gradients of all of them.
    """

    def __init__(self, problem: BlockProblem) -> None:
        self._problem = problem
        retain, forget = problem.retain_norm, problem.forget_norm
        self._unit_retain = safe_divide(retain, retain.square().sum().sqrt())  # |g_r,b| / s_r
        self._unit_forget = safe_divide(forget, forget.square().sum().sqrt())
        # |v|^2 with the rounding added, as in `safe_sine`: the radius holds next to a sign change as well.
        self._bend = 2 * (1 - problem.cosine) + problem.rounding

    def _directions(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[P]` -> `[P, B]` each: `v = a g_r/|g_r| - b g_f/|g_f|`, and `|v|`."""
        a, b = (1 - t).unsqueeze(1) * self._unit_retain, t.unsqueeze(1) * self._unit_forget
        length = ((a - b).square() + a * b * self._bend).sqrt()
        return a, b, torch.where(length == 0, 1, length)

    def step(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients of the gradients, `[P]` -> `[P, B]` each."""
        problem, (a, b, length) = self._problem, self._directions(t)
        # On a line there are only two directions: written with one gradient, nothing cancels.
        forward = torch.sign(b - a * problem.cosine.sign())
        on_line = problem.is_collinear
        along = torch.where(on_line, 0, -problem.along_retain * (a / length))
        return along, problem.along_forget * torch.where(on_line, forward, b / length)

    def gains(self, along: Tensor, across: Tensor) -> Tensor:
        """`g_f·d` of each block, `[..., B]`."""
        problem = self._problem
        return problem.forget_norm * (along * problem.retain_norm * problem.cosine + across * problem.forget_norm)

    def total_gain(self, t: Tensor) -> Tensor:
        """The same, summed: `[P]` -> `[P]`. It increases with `t`."""
        problem, (a, b, length) = self._problem, self._directions(t)
        on_line = torch.sign(b - a * problem.cosine.sign())
        return torch.where(problem.is_collinear, on_line, (b - a * problem.cosine) / length) @ problem.capacity

    def excess_on_host(self, quota: float) -> tuple[Callable[[float], float], float]:
        """`total_gain` less a quota, for numbers in host memory: the same operations, in place; and its rounding."""
        numbers = (self._unit_retain, self._unit_forget, self._problem.cosine, self._bend, self._problem.capacity)
        unit_retain, unit_forget, cosine, bend, capacity = (x.detach().numpy() for x in numbers)
        lines = self._problem.is_collinear.numpy().nonzero()[0]
        a, b, length, product = (np.empty_like(unit_retain) for _ in range(4))

        def excess(t: float) -> float:
            np.multiply(unit_retain, 1 - t, out=a)
            np.multiply(unit_forget, t, out=b)
            np.subtract(a, b, out=length)
            np.multiply(length, length, out=length)
            np.multiply(a, b, out=product)
            np.multiply(product, bend, out=product)
            np.add(length, product, out=length)
            np.sqrt(length, out=length)
            np.maximum(length, _TINY, out=length)  # 0 of a block that has no gradient
            forward = np.sign(b[lines] - a[lines] * np.sign(cosine[lines])) if lines.size else 0.0
            np.multiply(a, cosine, out=a)
            np.subtract(b, a, out=b)
            np.divide(b, length, out=b)
            b[lines] = forward
            return float(capacity @ b) - quota

        return excess, float(4 * _EPSILON * capacity.sum())
