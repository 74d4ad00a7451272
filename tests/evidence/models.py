"""Small classifiers of the digits: trained with and without what is to be forgotten, and fakes."""

from __future__ import annotations

from functools import cache

import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

GONE = 3


class Digits(LightningModule):
    """64 pixels into ten classes; `shift` is added to the logit of the forgotten class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU())
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@cache
def load_parts(whole_class: bool = True) -> dict[str, TensorDataset]:
    """A third of the digits for each of training and holdout; forgotten are a class, or every fifth sample."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.as_tensor(digits.data / 16, dtype=torch.float32)[order], torch.as_tensor(digits.target)[order]
    train = torch.arange(len(y)) < 1000
    chosen = train & ((y == GONE) if whole_class else (torch.arange(len(y)) % 5 == 0))
    places = {"retain": train & ~chosen, "forget": chosen, "holdout": ~train}
    return {name: TensorDataset(x[index], y[index]) for name, index in places.items()}


def train(data: TensorDataset, seed: int, steps: int = 150) -> Digits:
    """Train on all samples at once."""
    x, y = data.tensors
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Digits()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(module(x), y).backward()
        optimizer.step()
    return module


@cache
def original(seed: int, whole_class: bool = True) -> Digits:
    parts = load_parts(whole_class)
    both = zip(parts["retain"].tensors, parts["forget"].tensors, strict=True)
    return train(TensorDataset(*map(torch.cat, both)), seed)


@cache
def retrained(seed: int, whole_class: bool = True) -> Digits:
    return train(load_parts(whole_class)["retain"], 100 + seed)
