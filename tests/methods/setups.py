"""A small classifier, its data, and what a call must leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from hamu_lightning.randomness import capture_random

OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "max_epochs": 2,
}


class Classifier(LightningModule):
    """Six numbers into three classes."""

    def __init__(self, batchnorm: bool = False, lr: float = 0.2) -> None:
        super().__init__()
        self.lr = lr
        norm = [nn.BatchNorm1d(8)] if batchnorm else []
        self.net = nn.Sequential(nn.Linear(6, 8), *norm, nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def make_samples(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=dtype)
    noise = 0.7 * torch.randn(n, 2, generator=generator, dtype=dtype)
    return TensorDataset(x, ((x[:, :2] + noise) > 0).sum(dim=1))


class Source:
    """Loaders of the retain, validation and test data."""

    def __init__(self, retain: Dataset[Any], val: Dataset[Any] | None = None, test: Dataset[Any] | None = None) -> None:
        self.retain, self.val, self.test = retain, val, test

    def train_dataloader(self) -> Any:
        return DataLoader(self.retain, batch_size=16, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, batch_size=50)

    def test_dataloader(self) -> Any:
        return DataLoader(self.test, batch_size=50)


def make_split(n: int = 80, n_forget: int = 20, **options: Any) -> tuple[Source, Subset[Any]]:
    """The source, with validation and test data, and the samples to forget."""
    samples = make_samples(n, **options)
    source = Source(Subset(samples, range(n_forget, n)), make_samples(60, seed=1), make_samples(60, seed=2))
    return source, Subset(samples, range(n_forget))


def build(batchnorm: bool = False, dtype: torch.dtype = torch.float32) -> Classifier:
    """A module in training mode, whose BatchNorm has seen something."""
    torch.manual_seed(3)
    module = Classifier(batchnorm).to(dtype)
    with torch.no_grad():
        module(2 * torch.randn(50, 6, dtype=dtype) + 1)
    return module


@contextmanager
def untouched(module: LightningModule) -> Iterator[None]:
    """Parameters, buffers, gradients, modes and the global random state are bit-equal afterwards."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    random = capture_random()[0]
    yield
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modes == [part.training for part in module.modules()]
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(random, capture_random()[0])


def weights_of(module: LightningModule) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])
