"""Three small sets, with what is forgotten of them and a network for each.

- digits: scikit-learn's images, two hidden layers.
- mnist1d: signals, three convolutions.
- images: `image_project.py`: noisy digits, augmentation, dropout, BatchNorm, AdamW. Its models are measured without
  augmentation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import image_project
import torch
from classifier import Classifier
from digits import load_splits
from forgetting import choose_forget
from lightning.pytorch import LightningModule
from signals import load_cnn, make_cnn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hamu_lightning import split_forget

CLASSES, SHARE = 10, 0.1
FORGETS = ("class", "labels", "random")


class Case(NamedTuple):
    """One request: what is trained on, and what is measured."""

    train: Dataset[Any]
    retain: Dataset[Any]
    forget: Dataset[Any]
    parts: dict[str, Dataset[Any]]
    """What models are asked for, without augmentation."""
    gone: list[int]


@dataclass(frozen=True)
class SmallSet:
    """A set, a network, and how it is trained.

    Args:
        load: Makes training, validation and test data from a seed.
        make_module: Makes an untrained module.
        make_optimizer: Makes the optimizer that trains it.
        epochs: So many where labels are right, and so many where some are wrong.
        batch_size: Of training and of unlearning.
        clip: Largest length of the gradient in training.
        augments: Whether training moves an image, with new noise, at each reading.
    """

    load: Callable[[int], tuple[TensorDataset, TensorDataset, TensorDataset]]
    make_module: Callable[[], LightningModule]
    make_optimizer: Callable[[Any], Optimizer]
    epochs: tuple[int, int]
    batch_size: int = 64
    clip: float = float("inf")
    augments: bool = False

    def make(self, seed: int) -> LightningModule:
        """Return an untrained module."""
        torch.manual_seed(seed)
        return self.make_module()

    def case(self, forget: str, seed: int) -> Case:
        """Return the data of one seed: a class, a tenth with wrong labels, or a tenth at random is forgotten."""
        (x, y), *others = (part.tensors for part in self.load(seed))
        chosen = choose_forget(y, *(("class", seed % CLASSES) if forget == "class" else ("random", SHARE)), seed)
        labels = _mislabel(y, chosen, seed) if forget == "labels" else y
        retain, forgotten = split_forget(self._view(x, labels), chosen)
        val, test = (self._view(*part) for part in others)
        parts = {"retain": retain, "forget": forgotten, "holdout": val, "test": test}
        trained = self._view(x, labels, augments=self.augments)
        return Case(trained, *split_forget(trained, chosen), parts, [seed % CLASSES] if forget == "class" else [])

    def _view(self, x: Tensor, y: Tensor, *, augments: bool = False) -> Dataset[Any]:
        return image_project.Images(x, y, augments=augments) if self.augments else TensorDataset(x, y)

    def train(
        self, module: LightningModule, data: Dataset[Any], epochs: int, seed: int, part: nn.Module | None = None
    ) -> LightningModule:
        """Train a module; or only a part of it, with all else as it is, BatchNorm and dropout too."""
        loader = self.loader(data, seed)
        optimizer = self.make_optimizer((part or module).parameters())
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, epochs)
        module.train(part is None)
        torch.manual_seed(seed)
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(module(x), y).backward()
                nn.utils.clip_grad_norm_(module.parameters(), self.clip)
                optimizer.step()
            schedule.step()
        return module.eval()

    def loader(self, data: Dataset[Any], seed: int) -> DataLoader[Any]:
        """Return a shuffling loader."""
        random = torch.Generator().manual_seed(seed)
        return DataLoader(data, batch_size=self.batch_size, shuffle=True, generator=random)


def load_all(data: Dataset[Any], most: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the samples of a set, or the first of them."""
    x, y = next(iter(DataLoader(data, batch_size=most or len(data))))  # type: ignore[arg-type]
    return x, y


def _mislabel(y: Tensor, chosen: list[int], seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    labels = y.clone()
    labels[chosen] = (y[chosen] + torch.randint(1, CLASSES, (len(chosen),), generator=random)) % CLASSES
    return labels


def _make_mlp() -> Classifier:
    layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    return Classifier(nn.Sequential(nn.Flatten(), *layers), lr=1e-2)


def _load_signals(seed: int) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    problem = load_cnn()
    return problem.train, problem.val, problem.test


def _load_images(seed: int) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """The digits with noise of their own, drawn from the seed."""
    random = torch.Generator().manual_seed(seed)
    train, val, test = (part.tensors for part in load_splits())
    few = tuple(column[: image_project.TRAINED] for column in train)
    made = [
        TensorDataset(x + image_project.NOISE * torch.randn(x.shape, generator=random), y) for x, y in (few, val, test)
    ]
    return made[0], made[1], made[2]


def _sgd(weights: Any) -> Optimizer:
    return SGD(weights, lr=0.1, momentum=0.9)


def _adamw(weights: Any) -> Optimizer:
    return AdamW(weights, lr=1e-3, weight_decay=1e-2)


SETS = {
    "digits": SmallSet(lambda seed: load_splits(), _make_mlp, _sgd, (40, 80)),
    "mnist1d": SmallSet(_load_signals, make_cnn, _sgd, (20, 40), clip=2.0),
    "images": SmallSet(
        _load_images,
        image_project.Classifier,
        _adamw,
        (image_project.EPOCHS, 2 * image_project.EPOCHS),
        image_project.BATCH_SIZE,
        augments=True,
    ),
}
