"""Noise where the retain set does not notice it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from hamu_lightning.checks import check_number, check_positive, check_seed, store
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.loaders import in_order
from hamu_lightning.methods._data import hooked
from hamu_lightning.methods._fisher import expected_fisher
from hamu_lightning.methods._protocol import DataSource, Forget


@dataclass(frozen=True)
class FisherForgetting:
    """Adds noise to each weight: the less the retain set depends on it, the more.

        w_i <- w_i + (alpha / F_i)^(1/4) epsilon_i,      epsilon_i ~ N(0, 1)

    with the diagonal `F` of the Fisher information of the retain set, over the labels that the model predicts
    (Golatkar, Achille, Soatto, "Eternal Sunshine of the Spotless Net", CVPR 2020, https://arxiv.org/abs/1911.04933, the
    robust scrubbing procedure; its `lambda sigma_h^2` is `alpha` here). Code that circulates for it uses the exponent
    1/2 in place of 1/4, averages the variance along rows and clips it at absolute numbers.

    A weight that no retain sample depends on would get infinite noise: `F_i + damping mean(F)` stands for `F_i`, the
    mean over all weights. So the result does not depend on the scale of the loss, `alpha` being scaled with it.

    Args:
        alpha: Size of the noise, in the unit of Fisher information times the fourth power of a weight. The one to tune.
        damping: Floor of the Fisher information, as a share of its mean. 1e-4: at most ten times the usual noise.
        seed: Seed of the noise.

    Raises:
        HAMUValueError: If `alpha` is negative or `damping` not positive.

    Example:
        >>> FisherForgetting(alpha=1e-9).damping
        0.0001
    """

    alpha: float
    damping: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        alpha = check_number("alpha", self.alpha, least=0, cure="Begin with 1e-9.")
        damping = check_positive("damping", self.damping, "The default is 1e-4.")
        store(self, alpha=alpha, damping=damping, seed=check_seed(self.seed))

    def __call__(self, module: LightningModule, datamodule: DataSource, forget: Forget) -> LightningModule:
        """Return a copy with noise on its weights. Only the retain data are looked at."""
        fisher = expected_fisher(module, hooked(datamodule, in_order(datamodule.train_dataloader())))
        deviations = noise_deviations(fisher, self.alpha, self.damping)
        generator = torch.Generator().manual_seed(self.seed)
        result = copy.deepcopy(module)
        with torch.no_grad():
            for name, weight in result.named_parameters():
                if name in deviations:
                    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                    weight.add_((deviations[name].cpu() * noise).to(weight))
        return result


def noise_deviations(fisher: dict[str, Tensor], alpha: float, damping: float) -> dict[str, Tensor]:
    """Return the standard deviation of the noise of each weight.

    Raises:
        HAMUValueError: If the Fisher information is 0 everywhere.
    """
    mean = sum(float(f.sum()) for f in fisher.values()) / sum(f.numel() for f in fisher.values())
    if not mean > 0:
        raise HAMUValueError(
            f"Expected a positive Fisher information, but its mean is {mean}. Check that the logits depend on weights "
            "that require gradients."
        )
    return {name: (alpha / (f + damping * mean)) ** 0.25 for name, f in fisher.items()}
