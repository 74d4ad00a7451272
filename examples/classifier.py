"""What the small sets share: an ordinary LightningModule around any network, and the data of a set.

Nothing in this file knows of unlearning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


class Classifier(LightningModule):
    """Classifies with cross-entropy and plain SGD.

    Args:
        net: Maps a batch of inputs to logits `[N, K]`.
        lr: Learning rate.
    """

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs to logits `[N, K]`."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Annealing(Callback):
    """Lets the learning rate fall linearly to 0 from epoch to epoch. For the Trainer that trains, not for others."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the learning rate of the epoch."""
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * (1 - trainer.current_epoch / trainer.max_epochs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where it begins."""
        for group in trainer.optimizers[0].param_groups:
            group["initial_lr"] = group["lr"]


@dataclass(frozen=True)
class Problem:
    """A set and a model for it.

    Args:
        make_module: Makes an untrained module.
        train: Training data, a TensorDataset `(x, y)`.
        val: Data that is never trained on, for settings and held-out levels.
        test: Data that is never trained on and that decides nothing.
        epochs: So many make a model of it.
        options: More arguments of the Trainer that trains it.
        batch_size: Of training.
    """

    make_module: Callable[[], LightningModule]
    train: TensorDataset
    val: TensorDataset
    test: TensorDataset
    epochs: int
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64

    @property
    def lr(self) -> float:
        """The learning rate of training."""
        lr: float = self.make_module().lr
        return lr

    @property
    def trainer_options(self) -> dict[str, Any]:
        """The arguments of the Trainer that trains a model of it."""
        return {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": self.epochs, **self.options}


def split(x: Tensor, y: Tensor, *sizes: int) -> list[TensorDataset]:
    """Cut samples that are in random order into sets of these sizes, one after the other."""
    return [TensorDataset(*part) for part in zip(x.split(sizes), y.split(sizes), strict=True)]
