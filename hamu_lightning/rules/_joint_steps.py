"""The steps of all blocks at one exchange rate between the objectives (docs/method.md#allocations, eq. 5.7)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hamu_lightning.rules._closed_form import BlockProblem, safe_divide
from hamu_lightning.rules._search import read

_FLOAT = torch.finfo(torch.float64)


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
        problem = self._problem
        numbers = (self._unit_retain, self._unit_forget, problem.cosine, self._bend, problem.capacity)
        unit_retain, unit_forget, cosine, bend, capacity = (x.detach() for x in numbers)
        lines = problem.is_collinear.nonzero().squeeze(1)
        signs = cosine[lines].sign()
        a, b, length, product = (torch.empty_like(capacity) for _ in range(4))

        def excess(t: float) -> float:
            torch.mul(unit_retain, 1 - t, out=a)
            torch.mul(unit_forget, t, out=b)
            torch.sub(a, b, out=length).square_()
            torch.mul(a, b, out=product)
            length.addcmul_(product, bend).sqrt_().clamp_(min=_FLOAT.tiny)  # 0 of a block that has no gradient
            forward = torch.sign(b[lines] - a[lines] * signs) if len(lines) else None
            b.addcmul_(a, cosine, value=-1).div_(length)
            if forward is not None:
                b[lines] = forward
            return read(capacity @ b) - quota

        return excess, 4 * _FLOAT.eps * read(capacity.sum())
