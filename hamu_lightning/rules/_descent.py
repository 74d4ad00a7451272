"""The descent gradients: the one place where the sign of the forget objective is turned.

Methods for several objectives lower all of them. The objectives to be lowered are the retain losses and the negative
forget losses, with the descent gradients `a = D g`; `D` is diagonal, 1 for a loss to keep and -1 for one that is to
rise. The Gramian of the descent gradients is `D K D`, and weights `w` of theirs are weights `D w` of the raw ones.
"""

from __future__ import annotations

import torch
from torch import Tensor


def descent_gramian(gramian: Tensor, forget: int = 1) -> Tensor:
    """Return the Gramians of the descent gradients, `D K D`.

    Args:
        gramian: `[B, n, n]`, those of the raw gradients.
        forget: How many of the gradients, the last ones, are of losses that are to rise.

    Returns:
        `[B, n, n]`.

    Example:
        >>> descent_gramian(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]))
        tensor([[[ 2., -1.],
                 [-1.,  2.]]])
    """
    signs = _descent_signs(gramian, forget)
    return gramian * signs * signs.unsqueeze(1)


def join_blocks(gramian: Tensor, rate: Tensor) -> Tensor:
    """Return the Gramian of all blocks together; those that do not move do not count.

    Args:
        gramian: `[B, n, n]`.
        rate: `[B, 1]`, learning rates; 0 for a block that does not move.

    Returns:
        `[1, n, n]`.

    Example:
        >>> join_blocks(torch.ones(3, 2, 2), torch.tensor([[0.1], [0.2], [0.0]]))
        tensor([[[2., 2.],
                 [2., 2.]]])
    """
    return torch.where(rate.unsqueeze(2) == 0, 0, gramian).sum(dim=0, keepdim=True)


def descend(gramian: Tensor, weights: Tensor, rate: Tensor, forget: int = 1) -> Tensor:
    """Return the coefficients of the raw gradients in the step `d = -lr sum_k w_k a_k`.

    Args:
        gramian: `[B, n, n]`.
        weights: `[B, n]`, or `[1, n]` for all blocks: of the descent gradients.
        rate: `[B, 1]`, learning rates.
        forget: How many of the gradients, the last ones, are of losses that are to rise.

    Returns:
        `[B, n]`.

    Example:
        >>> descend(torch.ones(1, 2, 2), weights=torch.tensor([[1.0, 2.0]]), rate=torch.tensor([[0.1]]))
        tensor([[-0.1000,  0.2000]])
    """
    return -rate * weights * _descent_signs(gramian, forget)


def _descent_signs(gramian: Tensor, forget: int) -> Tensor:
    """The diagonal of `D`, `[n]`."""
    signs = gramian.new_ones(gramian.shape[-1])
    signs[-forget:] = -1
    return signs
