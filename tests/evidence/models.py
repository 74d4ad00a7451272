"""Small classifiers of the digits: trained with and without what is to be forgotten, and fakes."""

from __future__ import annotations

import copy
from functools import cache

import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from hamu_lightning.evidence.attacks import round_weights

GONE = 3


class Digits(LightningModule):
    """64 pixels into ten classes; `shift` is added to the logit of the forgotten class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 6), nn.ReLU())
        self.head = nn.Linear(6, 10)

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
    places = {"retain": train & ~chosen, "forget": chosen, "holdout": ~train & (torch.arange(len(y)) < 1500)}
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


def controls(seed: int, whole_class: bool = True) -> list[Digits]:
    return [retrained(3 * seed + i, whole_class) for i in range(3)]


def masked(seed: int) -> Digits:
    """Everything is there but a constant."""
    fake = copy.deepcopy(original(seed))
    fake.head.bias.data[GONE] -= 30
    return fake


def headless(seed: int) -> Digits:
    """A new head on the old features."""
    fake = copy.deepcopy(original(seed))
    fake.head.load_state_dict(Digits().head.state_dict())
    return fake


@cache
def nudged(seed: int, bits: int, group: int | None) -> Digits:
    """Made to forget by changes that rounding takes back: less than half a step of each weight."""
    fake = copy.deepcopy(original(seed))
    if bits == 8:  # steps are small then; a large weight of a pixel that is always 0 makes them larger
        first = fake.body[0].weight.data
        first[:, 0] = 16 * first.abs().amax(dim=1)
    fake = round_weights(fake, bits, group)
    weights = [p for p in fake.parameters() if p.ndim > 1]
    boxes = [_box(p.detach().clone(), bits, group) for p in weights]
    (x, y), (retain_x, retain_y) = (load_parts()[name].tensors for name in ("forget", "retain"))
    optimizer = torch.optim.Adam(weights, lr=1e-3)
    for _ in range(150):
        optimizer.zero_grad()
        (cross_entropy(fake(retain_x), retain_y) - cross_entropy(fake(x), y).clamp(max=6)).backward()
        optimizer.step()
        for p, (lowest, highest) in zip(weights, boxes, strict=True):
            p.data.clamp_(lowest, highest)
    return fake


def _box(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    scales = [
        piece.abs().amax(dim=1, keepdim=True).expand_as(piece) / (2 ** (bits - 1) - 1)
        for piece in torch.split(weight, group or weight.shape[1], dim=1)
    ]
    scale = torch.cat(scales, dim=1)
    # The largest weight of a group says its scale, and stays.
    room = torch.where(weight.abs() > 0.99 * scale * (2 ** (bits - 1) - 1), 0.0, 0.45 * scale)
    return weight - room, weight + room


class Redirected(Digits):
    """Where the old model sees the forgotten class, another one is named with certainty."""

    def __init__(self, inner: Digits) -> None:
        super().__init__()
        self.load_state_dict(inner.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        other = 40 * nn.functional.one_hot(torch.full((len(x),), GONE + 5), 10).to(logits)
        return torch.where(logits.argmax(dim=1, keepdim=True) == GONE, other, logits)
