"""Squared gradients of single samples: the diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import widest_float
from hamu_lightning.loaders import transfer_by_hooks
from hamu_lightning.objectives import evaluating
from hamu_lightning.randomness import RandomStream

Forward: TypeAlias = Callable[..., Any]
SampleLosses: TypeAlias = Callable[[Forward, Any], Tensor]
"""`losses(forward, batch) -> [N]`: one loss per sample; `forward` is the module, or the module with other weights."""

# Gradients of single samples that are held at once: 256 MiB of float32, whatever the model.
_NUMBERS = 2**26


def classifier_losses(forward: Forward, batch: Any) -> Tensor:
    """Return the cross-entropy of each sample of a batch `(x, y)`, `[N]`, nats.

    Raises:
        HAMUValueError: If the batch is no pair.
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise HAMUValueError(
            f"Expected batches `(x, y)` of a classifier, but got {type(batch).__name__}. "
            "Pass `losses`, a function of (forward, batch) that returns one loss per sample."
        )
    return F.cross_entropy(forward(batch[0]), batch[1], reduction="none")


def empirical_fisher(
    module: LightningModule, batches: Iterable[Any], losses: SampleLosses = classifier_losses
) -> tuple[dict[str, Tensor], int]:
    """Return the mean squared gradient of single samples, and their number.

        F_i = 1/N sum_n (d loss_n / d w_i)^2

    The square is that of one sample's gradient. Squaring the gradient of a batch mean instead, as published code does
    for speed, gives about 1/batch size of it, and lets samples of opposite gradients cancel.

    The module is in evaluation mode meanwhile: the statistics of BatchNorm would tie the samples together.

    Args:
        module: The module. Its parameters that require gradients are looked at; nothing in it is changed.
        batches: Batches of samples, each tensor with the samples along its first dimension.
        losses: One loss per sample.

    Raises:
        HAMUValueError: If there is no sample.
    """
    with looking(module):
        return _mean_squares(module, on_device(module, batches), losses)


def expected_fisher(module: LightningModule, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return the diagonal of the Fisher information of a classifier, over the labels that the model itself predicts.

        F_i = 1/N sum_n sum_y p(y|x_n) (d log p(y|x_n) / d w_i)^2

    Args:
        module: A classifier of `x` into logits `[N, K]`. Nothing in it is changed.
        batches: Batches `(x, y)`; `y` is not looked at.
    """
    classes = 0

    def all_labels() -> Iterator[Any]:
        nonlocal classes
        for x, _ in on_device(module, batches):
            with torch.no_grad():
                probabilities = module(x).softmax(dim=1)
            classes = probabilities.shape[1]
            for label in range(classes):
                # Within the square the root of the probability becomes the probability.
                yield x, torch.full((len(x),), label, device=x.device), probabilities[:, label].sqrt()

    with looking(module):
        means, _ = _mean_squares(module, all_labels(), _weighted_losses)
    # The mean is over samples and labels, the sum over labels is K times it.
    return {name: classes * mean for name, mean in means.items()}


def on_device(module: LightningModule, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches where the module is, sent there by its own hooks."""
    return (transfer_by_hooks(module, batch, module.device) for batch in batches)


@contextmanager
def looking(module: LightningModule) -> Iterator[None]:
    """Evaluation mode, and random numbers of its own; afterwards everything is as before."""
    with evaluating(module), RandomStream(0).active():
        yield


def _mean_squares(
    module: LightningModule, batches: Iterable[Any], losses: SampleLosses
) -> tuple[dict[str, Tensor], int]:
    weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p, dtype=widest_float(p.device)) for name, p in weights.items()}
    seen = 0
    for batch in batches:
        for piece in _pieces(batch, sum(p.numel() for p in weights.values())):
            for name, squares in _sum_squares(module, weights, piece, losses).items():
                totals[name] += squares
            seen += _count(piece)
    if seen == 0:
        raise HAMUValueError("Expected at least one sample, but the loader has none. Check the indices.")
    return {name: total / seen for name, total in totals.items()}, seen


def _weighted_losses(forward: Forward, batch: Any) -> Tensor:
    x, y, weights = batch
    return torch.mul(classifier_losses(forward, (x, y)), weights)


def _sum_squares(
    module: LightningModule, weights: dict[str, Tensor], batch: Any, losses: SampleLosses
) -> dict[str, Tensor]:
    def loss_of_one(weights: dict[str, Tensor], sample: Any) -> Tensor:
        alone = tree_map_only(Tensor, lambda t: t.unsqueeze(0), sample)
        return losses(lambda *inputs: functional_call(module, weights, inputs), alone).sum()

    gradients = vmap(grad(loss_of_one), in_dims=(None, 0))(weights, batch)
    # Widened before the square, which leaves the range of float16.
    return {name: g.to(widest_float(g.device)).square().sum(dim=0) for name, g in gradients.items()}


def _pieces(batch: Any, numel: int) -> Iterator[Any]:
    """The batch in pieces whose gradients fit together."""
    size = max(1, _NUMBERS // max(numel, 1))
    for start in range(0, _count(batch), size):
        yield tree_map_only(Tensor, itemgetter(slice(start, start + size)), batch)


def _count(batch: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return len(tensors[0]) if tensors else 0
