"""Objectives on the activations of a layer: representation misdirection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from hamu_lightning.checks import check_positive, check_seed, check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives._base import BatchPass, Objective, to_raise
from hamu_lightning.objectives._outputs import Outputs, as_outputs
from hamu_lightning.objectives._packed import check_padded
from hamu_lightning.objectives._prediction import mean_where
from hamu_lightning.objectives._reference import Reference, as_reference


class RMU(Objective):
    """Steer a layer's activations to a random direction (Li et al. 2024, WMDP, arXiv 2403.03218).

        to raise   -(1 / T) sum over tokens of |h_t - coefficient u|^2 <= 0,   |u| = 1

    per sample over its T tokens, then the mean over samples; u has uniform entries in [0, 1) before it is normalised.
    The square is summed over the H features as in the paper (its code takes the mean). Where the batch has an
    `attention_mask` `[N, T]`, the tokens that it leaves out do not count; activations `[N, H]` are one token.

    The retain half is `retain_objective=RMURetain(layer)`. Layers behind this one get no gradient: under DDP that takes
    `DDPStrategy(find_unused_parameters=True)`.

    Args:
        layer: Name of the layer, as in `module.named_modules()`. Its output is `[N, H]` or `[N, T, H]`, or a tuple that
            begins with it.
        coefficient: Length of the target, in the units of the activations.
        seed: Of the direction; it follows from the seed and H alone, so that no checkpoint holds it.
        outputs: How the module is run.

    Raises:
        HAMUValueError: If `coefficient` is not positive, or (at the first batch) there is no such layer.
    """

    def __init__(self, layer: str, coefficient: float, *, seed: int = 0, outputs: Outputs | None = None) -> None:
        self.layer, self.coefficient = check_layer(layer), check_positive("coefficient", coefficient)
        self.seed = check_seed(seed)
        self.outputs = as_outputs(outputs)

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        activations = read_activations(batch.module, self.layer, batch.batch, self.outputs)
        target = self.coefficient * draw_direction(activations.shape[-1], self.seed).to(activations)
        return to_raise(mean_square(activations - target, batch.batch))


class RMURetain(Objective):
    """Keep a layer's activations as the reference has them; the retain half of `RMU`.

        to lower   (1 / T) sum over tokens of |h_t - h_ref,t|^2

    Args:
        layer: As for `RMU`.
        reference: A model, `FrozenCopy()` or `AdaptersDisabled()`; stored logits hold no activations.
        outputs: How the models are run.
    """

    is_forget_only = False
    _parts = ("reference",)

    def __init__(self, layer: str, *, reference: Reference | None = None, outputs: Outputs | None = None) -> None:
        self.layer, self.reference = check_layer(layer), as_reference(reference)
        self.outputs = as_outputs(outputs)

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        activations = read_activations(batch.module, self.layer, batch.batch, self.outputs)
        with torch.no_grad(), self.reference.using(batch.module) as reference:
            kept = read_activations(reference, self.layer, batch.batch, self.outputs)
        return mean_square(activations - kept, batch.batch)


def check_layer(layer: object) -> str:
    """Raise unless a value can be the name of a layer; return it."""
    name: str = check_type("layer", layer, str, "the name of a layer, as in `module.named_modules()`")
    return name


def read_activations(module: nn.Module, layer: str, batch: Any, outputs: Outputs) -> Tensor:
    """Run a module on a batch, and return a layer's output: `[N, T, H]`, float32 or wider.

    Raises:
        HAMUValueError: If there is no such layer, it did not run, or its output has another form.
    """
    with _watching(module, layer) as seen:
        outputs(module, batch)
    value = seen[0] if seen else None
    value = value[0] if isinstance(value, tuple) else value
    if not isinstance(value, Tensor) or value.dim() not in (2, 3):
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__ if seen else "no call"
        raise HAMUValueError(
            f"Expected the layer {layer!r} to run and to return activations [N, H] or [N, T, H], but got {found}. "
            "Choose another layer of `module.named_modules()`."
        )
    value = value.unsqueeze(1) if value.dim() == 2 else value  # [N, 1, H]
    return value.to(torch.promote_types(value.dtype, torch.float32))


def draw_direction(size: int, seed: int) -> Tensor:
    """A unit vector `[size]`, float64, with entries drawn from [0, 1) before it is normalised."""
    direction = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(direction, dim=0)


def mean_square(differences: Tensor, batch: Any) -> Tensor:
    """Squared length of `[N, T, H]` over H, the mean over the tokens of each sample, `[N]`."""
    squares = differences.square().sum(-1)
    check_padded(batch, squares.shape, "RMU, which takes the mean over each sample's tokens")
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != squares.shape:
        return squares.mean(1)
    return mean_where(squares, mask.bool())


@contextmanager
def _watching(module: nn.Module, layer: str) -> Iterator[list[Any]]:
    try:
        watched = module.get_submodule(layer)
    except AttributeError as error:
        raise HAMUValueError(
            f"Expected `layer` to be the name of a layer, but {type(module).__name__} has no {layer!r}. "
            "The names are those of `module.named_modules()`."
        ) from error
    seen: list[Any] = []
    handle = watched.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
