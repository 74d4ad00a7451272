"""When collateral damage cannot be avoided: the joint bound F (docs/method.md#certificates)."""

from __future__ import annotations

import torch
from torch import Tensor

from hamu_lightning.rules._search import minimise_convex


def compute_feasible_improvement(gramian: Tensor, radius: Tensor) -> Tensor:
    """Compute the largest forget improvement that any step inside the radii can give without raising the retain loss.

    Solves, to first order and jointly over the blocks, `max sum_b g_f,b·d_b` subject to `sum_b g_r,b·d_b <= 0` and
    `|d_b| <= R_b`, by its dual (docs/method.md#certificates, eq. 6.3 and 6.4):

        F = min over mu >= 0 of  sum_b R_b sqrt(ff_b - 2 mu rf_b + mu^2 rr_b)

    which is convex in mu. Asking for more than F proves that the step must cost retain quality, whatever the
    allocation of the quota; the paper's test `kappa > kappa_2` is the case of one block.

    Args:
        gramian: `[B, 2, 2]`, float64, in the order retain, forget.
        radius: `[B]`, L2 lengths in weight space.

    Returns:
        F in loss units per step, 0-d. Exact to 1e-9 of the total capacity `sum_b R_b |g_f,b|`.

    Example:
        >>> compute_feasible_improvement(torch.tensor([[[1.0, 0.6], [0.6, 1.0]]]), torch.tensor([1.0]))
        tensor(0.8000)
    """
    retain_norm, forget_norm = gramian[:, 0, 0].clamp(min=0).sqrt(), gramian[:, 1, 1].clamp(min=0).sqrt()  # [B]
    capacity, retain_capacity = (radius * forget_norm).sum(), (radius * retain_norm).sum()
    # Beyond mu = 2 capacity / retain_capacity the bound exceeds its value at mu = 0. In units of that, mu is in [0, 1].
    has_retain = retain_capacity > 0
    mu_max = 2 * capacity / torch.where(has_retain, retain_capacity, torch.ones_like(retain_capacity))

    def bound(mu: Tensor) -> Tensor:  # [P] -> [P]
        mu = mu.unsqueeze(1)
        square = gramian[:, 1, 1] - 2 * mu * gramian[:, 0, 1] + mu.square() * gramian[:, 0, 0]  # [P, B]
        return (radius * square.clamp(min=0).sqrt()).sum(dim=1)

    def slope(mu: Tensor) -> Tensor:  # [P] -> [P]: that of the bound
        mu = mu.unsqueeze(1)
        along = mu * gramian[:, 0, 0] - gramian[:, 0, 1]  # g_r·(mu g_r - g_f)
        square = gramian[:, 1, 1] - 2 * mu * gramian[:, 0, 1] + mu.square() * gramian[:, 0, 0]
        # No vector is shorter than its part along g_r: rounding would make the quotient anything where it is all of it.
        length = torch.maximum(square.clamp(min=0).sqrt(), along.abs() / torch.where(retain_norm == 0, 1, retain_norm))
        return (along / torch.where(length == 0, 1, length)) @ radius

    value = minimise_convex(lambda t: bound(t * mu_max), lambda t: slope(t * mu_max), like=gramian)
    return torch.where(has_retain, value, capacity)
