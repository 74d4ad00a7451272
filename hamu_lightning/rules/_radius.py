"""Trust regions: how far each block may move in one step (docs/method.md#radii)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hamu_lightning.checks import check_number, check_positive, check_type, describe, store
from hamu_lightning.errors import HAMUValueError


class Radius(ABC):
    """The radius of every block, as a function of what is known about the block."""

    needs_weights: bool = False
    """Whether `weight_norms` and `sizes` must be given."""

    @abstractmethod
    def compute(
        self, free_norm: Tensor, lr: Tensor, weight_norms: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        """Compute the radii.

        Args:
            free_norm: `[B]`, L2 norms of the gradient of the objective that is optimised (HAMU-Q: retain).
            lr: `[B]` learning rates.
            weight_norms: `[B]`, L2 norms of the weights.
            sizes: `[B]`, numbers of weights.

        Returns:
            `[B]`, L2 lengths in weight space per step.
        """


@dataclass(frozen=True)
class LearningRateRadius(Radius):
    """The paper's radius: the length of the plain SGD step, `R_b = lr |g_r,b|` (HAMU-U: `lr |g_f,b|`).

    The direct step is then SGD on the retain loss. The radius grows with the gradient: a learning rate that is ten
    times too large destroys a model, and on a converged model the radius nearly vanishes.

    Example:
        >>> LearningRateRadius().compute(torch.tensor([2.0]), torch.tensor([0.1]))
        tensor([0.2000])
    """

    def compute(
        self, free_norm: Tensor, lr: Tensor, weight_norms: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        """Return `lr * free_norm`."""
        return lr * free_norm


@dataclass(frozen=True)
class FixedRadius(Radius):
    """The same radius for every block.

    Args:
        radius: L2 length in weight space per step, positive.

    Raises:
        HAMUValueError: If `radius` is not positive and finite.

    Example:
        >>> FixedRadius(0.5).compute(torch.tensor([2.0, 0.0]), torch.tensor([0.1, 0.1]))
        tensor([0.5000, 0.5000])
    """

    radius: float

    def __post_init__(self) -> None:
        """Check the length."""
        store(self, radius=check_positive("radius", self.radius))

    def compute(
        self, free_norm: Tensor, lr: Tensor, weight_norms: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        """Return the radius for each block."""
        return torch.full_like(free_norm, self.radius)


@dataclass(frozen=True)
class RelativeRadius(Radius):
    """A share of the weights' own length: `R_b = fraction max(|w_b|, floor rms(w) sqrt(n_b))`.

    No block moves by more than that share of its own norm, whatever the gradients and the learning rate. The floor
    keeps fresh biases and LoRA's zero matrices alive: `rms(w)` is the root mean square of all weights, `n_b` the
    number of the block's weights.

    Args:
        fraction: Share of the norm that one step may move, positive; 1e-4 to 1e-2 are usual.
        floor: Share of the overall root mean square that a block is taken to have at least, not negative.

    Raises:
        HAMUValueError: If one of them is out of range.

    Example:
        >>> radius = RelativeRadius(0.01)
        >>> radius.compute(torch.ones(2), torch.ones(2), torch.tensor([3.0, 0.0]), torch.tensor([9, 9]))
        tensor([0.0300, 0.0021])
    """

    needs_weights = True
    fraction: float
    floor: float = 0.1

    def __post_init__(self) -> None:
        """Check the shares."""
        fraction = check_positive("fraction", self.fraction)
        floor = check_number("floor", self.floor, least=0, wanted="a share of the root mean square (not negative)")
        store(self, fraction=fraction, floor=floor)

    def compute(
        self, free_norm: Tensor, lr: Tensor, weight_norms: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        """Return the share of each block's norm. All weights zero gives radius 0."""
        found = [tensor.shape if isinstance(tensor, Tensor) else None for tensor in (weight_norms, sizes)]
        if weight_norms is None or sizes is None or found != [free_norm.shape] * 2:
            raise HAMUValueError(
                f"Expected `weight_norms` and `sizes`, `[{len(free_norm)}]` each, with `RelativeRadius`, but got "
                f"{describe(weight_norms)} and {describe(sizes)}. "
                "HAMUOptimizer gives them by itself; in a direct call compute them from the weights of each block."
            )
        norms, sizes = weight_norms.to(free_norm), sizes.to(free_norm)
        mean_square = norms.square().sum() / sizes.sum()
        return self.fraction * torch.maximum(norms, self.floor * (mean_square * sizes).sqrt())


@dataclass(frozen=True)
class ScaledRadius(Radius):
    """A multiple of another radius: what `Rule.in_region` makes of a rule's own one.

    Args:
        radius: The other one.
        scale: The factor, positive.

    Raises:
        HAMUValueError: If it is not.

    Example:
        >>> ScaledRadius(FixedRadius(0.5), 0.1).compute(torch.tensor([2.0]), torch.tensor([0.1]))
        tensor([0.0500])
    """

    radius: Radius
    scale: float

    def __post_init__(self) -> None:
        """Check both."""
        check_radius(self.radius)
        store(self, scale=check_positive("scale", self.scale))

    @property
    def needs_weights(self) -> bool:  # type: ignore[override]
        """As for the other one."""
        return self.radius.needs_weights

    def compute(
        self, free_norm: Tensor, lr: Tensor, weight_norms: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        """Return the multiple."""
        return self.scale * self.radius.compute(free_norm, lr, weight_norms, sizes)


def check_radius(radius: object) -> None:
    """Raise unless a rule's argument is a radius; a bare number might mean any of them.

    Raises:
        HAMUValueError: If it is not.
    """
    example = f"FixedRadius({describe(radius)})" if isinstance(radius, float | int) else "FixedRadius(0.1)"
    check_type("radius", radius, Radius, f"a radius such as {example}")
