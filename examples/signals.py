"""MNIST-1D: signals of 40 numbers in ten classes (Greydanus 2020, arXiv 2011.14439), and two small networks for them.

Nothing in this file knows of unlearning. Nothing is downloaded either: the package `mnist1d` makes the signals from a
seed. With 2000 of them a model gets 95 to 98 % of its training data right and 83 % of others: it does not fit all, and
what it fits it remembers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from classifier import Annealing, Classifier, Problem, split
from torch import Tensor, nn

LENGTH, CLASSES = 40, 10
TRAIN, VAL, TEST = 2000, 1000, 2000
SEED = 42


def make_cnn(width: int = 32) -> Classifier:
    """Make a network of three convolutions and a linear head."""
    layers: list[nn.Module] = []
    for channels, kernel in ((1, 5), (width, 3), (width, 3)):
        layers += [nn.Conv1d(channels, width, kernel, stride=2, padding=kernel // 2), nn.ReLU()]
    return Classifier(nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * LENGTH // 8, CLASSES)), lr=0.3)


class Transformer(nn.Module):
    """Reads a signal as ten pieces of four numbers; two layers of attention.

    Args:
        width: Numbers per piece inside.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Conv1d(1, width, 4, stride=4)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH // 4, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map signals `[N, 1, 40]` to logits `[N, 10]`."""
        pieces = self.embed(x).mT + self.places  # [N, 10, width]
        logits: Tensor = self.head(self.encoder(pieces).mean(dim=1))
        return logits


def make_transformer() -> Classifier:
    """Make a transformer of two layers."""
    return Classifier(Transformer(), lr=0.2)


@cache
def load_signals() -> tuple[Tensor, Tensor]:
    """Make the signals `[N, 1, 40]` and their labels `[N]`, in random order, always the same."""
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Expected the package `mnist1d`, which makes the signals, but it is missing. Run: pip install mnist1d"
        ) from error
    args = get_dataset_args()
    args.num_samples, args.seed = TRAIN + VAL + TEST, SEED
    states = random.getstate(), np.random.get_state()
    made = make_dataset(args)  # it seeds the global generators
    random.setstate(states[0])
    np.random.set_state(states[1])
    x, y = (np.concatenate((made[name], made[f"{name}_test"])) for name in "xy")
    return torch.as_tensor(x, dtype=torch.float32)[:, None], torch.as_tensor(y)


def load_cnn() -> Problem:
    """Return the signals with the convolutional network."""
    return _load(make_cnn)


def load_transformer() -> Problem:
    """Return the signals with the transformer."""
    return _load(make_transformer)


def _load(make_module: Callable[[], Classifier]) -> Problem:
    options = {"gradient_clip_val": 2.0, "callbacks": Annealing()}
    return Problem(make_module, *split(*load_signals(), TRAIN, VAL, TEST), epochs=50, options=options)
