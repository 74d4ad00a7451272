"""Trust regions: how far each block may move in one step (docs/method.md#radii)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from hamu_lightning.checks import check_number, check_positive, check_type, describe, store
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.rules._adapters import Adapter, bound_spectral_norms, whole


class WeightLayout(Protocol):
    """What a radius may see of the weights that a step moves: T tensors in B blocks."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The tensors."""
        ...

    @property
    def blocks(self) -> Sequence[int]:
        """For each tensor the index of its block."""
        ...

    @property
    def counts(self) -> Sequence[int]:
        """For each tensor the number of its weights that may move."""
        ...

    @property
    def sizes(self) -> Sequence[int]:
        """The same for each block."""
        ...

    @property
    def adapters(self) -> Sequence[Adapter]:
        """Those of which a factor is among the tensors."""
        ...

    def tensor_norms(self) -> Tensor:
        """The L2 norm of each tensor's weights that may move, `[T]`."""
        ...

    def weight_norms(self) -> Tensor:
        """The same for each block, `[B]`."""
        ...

    def vector(self, values: Sequence[float | Tensor]) -> Tensor:
        """Numbers as a tensor on the device, wide."""
        ...


class Radius(ABC):
    """The radius of every block, as a function of what is known about the block."""

    needs_weights: bool = False
    """Whether `weight_norms` and `sizes` must be given."""

    def check(self, layout: WeightLayout) -> None:  # noqa: B027  # most radii fit all weights
        """Raise unless the radius makes sense for these weights; called once, before the first step."""

    def measure(self, layout: WeightLayout) -> dict[str, Tensor]:
        """What `compute` needs to know of the weights as they are now: called before each step."""
        if not self.needs_weights:
            return {}
        return {"weight_norms": layout.weight_norms(), "sizes": layout.vector(layout.sizes)}

    @abstractmethod
    def compute(
        self, free_norm: Tensor, lr: Tensor, weight_norms: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        """Compute the radii.

        Args:
            free_norm: `[B]`, L2 norms of the gradient of the objective that is optimised (HAMU-Q: retain).
            lr: `[B]` learning rates.
            weight_norms: `[B]`, L2 norms of the weights, or what `measure` gives in their place.
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
class AdapterRadius(Radius):
    """A share of the weights that low-rank adapters change: `|s (B A)_new - s B A|_F <= fraction |W|_F` in each step.

    The norm of the factors A and B says nothing of what they do: fresh ones have B = 0, and a share of its length is
    next to nothing. What counts is the weight `W + s B A`. A step of length R changes it by at most

        gain R + s R^2 / 2,   gain = s sqrt(|A|_2^2 + |B|_2^2)

    whatever its direction (docs/method.md#radii, eq. 4.8 to 4.14), and the radius is the R for which that is the share.
    Without the square it is the largest ball for which the bound holds to first order. Where a block holds several
    adapters, the bound is one for all of their weights together, as that of `RelativeRadius` is. Weights that belong to
    no adapter are treated as with `RelativeRadius`.

    The optimizer has to know the adapters: HAMUCallback finds those of PEFT and loralib, others go into
    `HAMUOptimizer(adapters=...)`. DoRA's magnitudes are weights that belong to none; what they do to the product is not
    seen.

    Args:
        fraction: Share of the norm that one step may move, positive.
        floor: As for `RelativeRadius`, for weights that belong to no adapter.

    Raises:
        HAMUValueError: If one of them is out of range.

    Example:
        >>> AdapterRadius(0.01).compute(torch.ones(1), torch.ones(1), weight_norms=torch.tensor([3.0]))
        tensor([0.0300])
    """

    needs_weights = True
    fraction: float
    floor: float = 0.1

    def __post_init__(self) -> None:
        """Check the shares."""
        like = RelativeRadius(self.fraction, self.floor)
        store(self, fraction=like.fraction, floor=like.floor)

    @override
    def check(self, layout: WeightLayout) -> None:
        """Raise unless some of the weights are factors of an adapter."""
        if not layout.adapters:
            raise HAMUValueError(
                f"Expected adapters among the weights with {self}, but got none. "
                "HAMUOptimizer(adapters=find_adapters(module)) knows PEFT's and loralib's over a base of floating "
                "point numbers, pair_adapters(...) finds others by name; else use RelativeRadius(1e-2, floor=1.0)."
            )

    @override
    @torch.no_grad()
    def measure(self, layout: WeightLayout) -> dict[str, Tensor]:
        """The length L of each block for which `fraction L` is its radius, as `weight_norms`."""
        changed, gain, bend = self._lengths(layout)
        budget = self.fraction * changed
        slope = gain + (gain.square() + 2 * bend * budget).sqrt()
        lengths = 2 * changed / slope.clamp(min=torch.finfo(slope.dtype).tiny)
        return {"weight_norms": lengths, "sizes": layout.vector(layout.sizes)}

    def compute(
        self, free_norm: Tensor, lr: Tensor, weight_norms: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        """Return the share of what `measure` gave."""
        if weight_norms is None or weight_norms.shape != free_norm.shape:
            raise HAMUValueError(
                f"Expected `weight_norms`, `[{len(free_norm)}]`, with `AdapterRadius`, but got "
                f"{describe(weight_norms)}. HAMUOptimizer gives what `measure` makes of the weights by itself."
            )
        return self.fraction * weight_norms.to(free_norm)

    def _lengths(self, layout: WeightLayout) -> tuple[Tensor, Tensor, Tensor]:
        """For each block the norm of all that it changes, and the bounds of the change by a step: gain and bend."""
        adapters = layout.adapters
        block_of = {id(p): block for p, block in zip(layout.parameters, layout.blocks, strict=True)}
        base_squares = torch.stack([a.base_norm().to(layout.vector([0.0])) for a in adapters]).square()
        squares, counts = self._others(layout)
        mean_square = (base_squares.sum() + squares.sum()) / (sum(a.base.numel() for a in adapters) + counts.sum())
        changed = torch.maximum(squares, self.floor**2 * mean_square * counts)  # [B]
        gain, bend = (counts > 0).to(squares), torch.zeros_like(squares)
        places = [sorted({block_of[id(f)] for f in (a.down, a.up) if id(f) in block_of}) for a in adapters]
        index = torch.tensor([b for found in places for b in found], device=squares.device)
        owner = torch.tensor([i for i, found in enumerate(places) for _ in found], device=squares.device)
        # Where the two factors are in two blocks, both may use their radius: sqrt(2) R for the pair.
        split = layout.vector([len(found) for found in places])
        scaling = layout.vector([a.scaling for a in adapters])
        gains = split.sqrt() * scaling * _pair_norms(adapters, block_of)
        changed = changed.index_add(0, index, base_squares[owner]).sqrt()
        gain = gain.scatter_reduce(0, index, gains[owner], "amax")
        bend = bend.scatter_reduce(0, index, (split * scaling)[owner], "amax")
        return changed, gain, bend

    def _others(self, layout: WeightLayout) -> tuple[Tensor, Tensor]:
        """For each block the sum of squares, and the number, of the weights that belong to no adapter."""
        factors = {id(f) for a in layout.adapters for f in (a.down, a.up)}
        is_other = layout.vector([float(id(p) not in factors) for p in layout.parameters])
        index = torch.tensor(list(layout.blocks), device=is_other.device)
        zeros = layout.vector([0.0] * len(layout.sizes))
        squares = zeros.index_add(0, index, is_other * layout.tensor_norms().to(is_other).square())
        return squares, zeros.index_add(0, index, is_other * layout.vector([float(n) for n in layout.counts]))


def _pair_norms(adapters: Sequence[Adapter], block_of: dict[int, int]) -> Tensor:
    """`sqrt(|A|_2^2 + |B|_2^2)` for each adapter; without the factor beside which the other one rests."""
    downs = bound_spectral_norms([whole(a.down).flatten(1) for a in adapters])
    ups = bound_spectral_norms([whole(a.up).flatten(1).T for a in adapters])
    moves = [[float(id(f) in block_of) for f in (a.up, a.down)] for a in adapters]
    up_moves, down_moves = torch.tensor(moves, dtype=downs.dtype, device=downs.device).unbind(1)
    return (up_moves * downs.square() + down_moves * ups.square()).sqrt()


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

    @override
    def check(self, layout: WeightLayout) -> None:
        """As for the other one."""
        self.radius.check(layout)

    @override
    def measure(self, layout: WeightLayout) -> dict[str, Tensor]:
        """As for the other one."""
        return self.radius.measure(layout)

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
