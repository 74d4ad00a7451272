"""SalUn's saliency mask: which weights the forget loss depends on most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hamu_lightning.callbacks.passes import BarePass, ModuleGuard, batchnorm_frozen, check_module
from hamu_lightning.checks import check_number, check_seed
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.optim import GradientSlot, keep_largest
from hamu_lightning.randomness import RandomStream


def compute_saliency_mask(
    module: nn.Module,
    forget_loader: Iterable[Any],
    keep: float = 0.5,
    *,
    batchnorm: Literal["freeze", "retain"] = "freeze",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Find the weights that matter most for the forget loss, for `mask=` of `HAMUCallback` and `HAMUOptimizer`.

    The mask of SalUn (Fan et al. 2024, section 4) is `1(|g_f| >= gamma)`, with the gradient of the mean loss over all
    of the forget data, and one threshold for the whole model: here it is the one that keeps the share `keep`. The
    paper keeps half of the weights.

    Takes one pass over the data, without a Trainer, and leaves no trace: see `preflight`.

    Args:
        module: A LightningModule, or another module with `training_step(batch)` or `training_step(batch, batch_idx)`.
        forget_loader: Batches to forget, with a length.
        keep: The share of the weights that may move, in (0, 1].
        batchnorm: As for `HAMUCallback`: "freeze" takes BatchNorm layers in evaluation mode, "retain" as they are.
        seed: Seed of the random numbers that shuffling, dropout and the like draw.

    Returns:
        For the name of each parameter that requires grad a bool tensor of its shape, True where a weight may move.

    Raises:
        HAMUValueError: If an argument cannot be used, or the gradient is not finite.
        HAMUStateError: If the module needs a Trainer, or gives no loss.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> mask = compute_saliency_mask(BoringModel(), [torch.eye(32)[:3]], keep=0.1)
        >>> {name: int(part.sum()) for name, part in mask.items()}
        {'layer.weight': 5, 'layer.bias': 2}
    """
    check_module(module, batchnorm)
    seed = check_seed(seed)
    check_number("keep", keep, above=0, most=1)
    scores = _GradientSum({name: p for name, p in module.named_parameters() if p.requires_grad})
    one = BarePass(module, forget_loader, "forget", ModuleGuard(module), RandomStream(seed), scores.slot)
    if one.stream.length is None:
        raise HAMUValueError(
            "Expected `forget_loader` to have a length, since the mask is that of all of its batches, but got a "
            f"{type(forget_loader).__name__}. Give a DataLoader over a Dataset with a length, or a list of batches."
        )
    found = False
    with batchnorm_frozen(module, batchnorm == "freeze"):
        for _ in range(one.stream.length):
            if one.run_next() is not None:
                found = True
                scores.add(1.0 if math.isnan(one.samples) else one.samples)
    if not found:
        raise HAMUStateError("Expected `training_step` to return a loss, but it returned None for all forget data.")
    return keep_largest({name: total.abs() for name, total in scores.totals.items()}, keep)


class _GradientSum:
    """Sums up gradients.

    Args:
        parameters: What they are of, by name.

    Attributes:
        totals: The sums by name, in float32 or wider.
    """

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self._parameters, self._last = parameters, GradientSlot()
        self.totals = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
            for name, p in parameters.items()
        }

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Let `backward()` accumulate apart from everybody's `.grad`."""
        with self._last.filling(self._parameters.values()):
            yield

    @torch.no_grad()
    def add(self, weight: float) -> None:
        """Add the last gradient, so many times."""
        for name, parameter in self._parameters.items():
            grad = self._last.get(parameter)
            if grad is not None:
                self.totals[name].add_(grad.to_dense() if grad.is_sparse else grad, alpha=weight)
        self._last.release()
