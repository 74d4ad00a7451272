"""Twenty classes of made-up points in 32 dimensions, and a network with two hidden layers for them.

Nothing in this file knows of unlearning. With 2000 points a model gets all of its training data right and 60 % of
others: it knows much of them by heart.
"""

from __future__ import annotations

import torch
from classifier import Classifier, Problem, split
from sklearn.datasets import make_classification
from torch import nn

FEATURES, CLASSES = 32, 20
TRAIN, VAL, TEST = 2000, 1000, 2000


def make_mlp(width: int = 128) -> Classifier:
    """Make a network of two hidden layers."""
    hidden = [nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return Classifier(nn.Sequential(*hidden, nn.Linear(width, CLASSES)), lr=0.1)


def load_synthetic() -> Problem:
    """Make the points `[N, 32]`, in units of their standard deviation, always the same: each class is one cloud."""
    x, y = make_classification(
        n_samples=TRAIN + VAL + TEST,
        n_features=FEATURES,
        n_informative=16,
        n_redundant=0,
        n_classes=CLASSES,
        n_clusters_per_class=1,
        flip_y=0.0,
        random_state=0,
    )
    points = torch.as_tensor((x - x.mean(axis=0)) / x.std(axis=0), dtype=torch.float32)
    return Problem(make_mlp, *split(points, torch.as_tensor(y), TRAIN, VAL, TEST), epochs=50)
