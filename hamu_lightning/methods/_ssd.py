"""Selective synaptic dampening."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from hamu_lightning.checks import check_number, check_type, store
from hamu_lightning.loaders import in_order
from hamu_lightning.methods._data import hooked
from hamu_lightning.methods._fisher import SampleLosses, classifier_losses, empirical_fisher
from hamu_lightning.methods._protocol import DataSource, Forget


@dataclass(frozen=True)
class SSD:
    """Selective synaptic dampening: shrinks the weights that matter more for the forget set than for all data.

    With the importances `I_D` on all training data (retain and forget) and `I_f` on the forget set, the mean squared
    gradients of single samples,

        w_i <- beta_i w_i  where  I_f,i > alpha I_D,i,      beta_i = min(lambda I_D,i / I_f,i, 1)

    (Foster, Schoepf, Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening",
    AAAI 2024, https://arxiv.org/abs/2308.07707). No training step, no random numbers. The published code squares the
    gradient of each batch mean, which has another scale and depends on the batch size.

    Args:
        alpha: How many times more important a weight must be for the forget set to be selected. The paper has 10 for
            ResNet-18 and 5 for ViT. Smaller forgets more; the one to tune. From `N / N_f` on, the number of all samples
            by that of the forget set, nothing is selected: `I_D,i >= (N_f / N) I_f,i`.
        lambda_: Strength of the dampening, 1 in the paper. Smaller dampens more.
        losses: One loss per sample: `losses(forward, batch) -> [N]`. Default: the cross-entropy of batches `(x, y)`.

    Raises:
        HAMUValueError: If `alpha` or `lambda_` is negative.

    Example:
        >>> SSD(alpha=5.0).lambda_
        1.0
    """

    alpha: float = 10.0
    lambda_: float = 1.0
    losses: SampleLosses = classifier_losses

    def __post_init__(self) -> None:
        for name in ("alpha", "lambda_"):
            cure = "The paper has 10 and 1."
            store(self, **{name: check_number(name, getattr(self, name), least=0, cure=cure)})
        check_type("losses", self.losses, Callable, "a function of (forward, batch)")

    def __call__(self, module: LightningModule, datamodule: DataSource, forget: Forget) -> LightningModule:
        """Return a copy with some weights dampened."""
        retain = datamodule.train_dataloader()
        sets = (in_order(retain), in_order(forget, like=retain))
        (on_retain, n_retain), (on_forget, n_forget) = (
            empirical_fisher(module, hooked(datamodule, batches), self.losses) for batches in sets
        )
        result = copy.deepcopy(module)
        with torch.no_grad():
            for name, weight in result.named_parameters():
                if name in on_forget:
                    on_all = (n_retain * on_retain[name] + n_forget * on_forget[name]) / (n_retain + n_forget)
                    weight.mul_(dampening(on_all, on_forget[name], self.alpha, self.lambda_))
        return result


def dampening(on_all: Tensor, on_forget: Tensor, alpha: float, lambda_: float) -> Tensor:
    """Return the factor of each weight from the importances, which all have its shape."""
    beta = (lambda_ * on_all / on_forget).clamp(max=1)
    # Where both are 0 the quotient is no number, and nothing is selected.
    return torch.where(on_forget > alpha * on_all, beta, torch.ones_like(beta))
