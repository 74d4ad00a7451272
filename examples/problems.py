"""The sets of the comparison by name: data, and a model for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from classifier import Problem
from digits import DigitsClassifier, load_splits
from forgetting import Data, split_data
from quickstart import EPOCHS
from signals import load_cnn, load_transformer
from synthetic import load_synthetic
from torch.utils.data import DataLoader


def load_digits() -> Problem:
    """Return the digits of the quickstart with its ResNet-20."""
    return Problem(DigitsClassifier, *load_splits(), epochs=EPOCHS)


@dataclass
class Source:
    """The loaders: the retain stream, and two sets that are never trained on."""

    data: Data
    batch_size: int

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the retain stream."""
        return DataLoader(self.data.retain, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return what settings are chosen on."""
        return DataLoader(self.data.val, batch_size=500)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return what the numbers are computed on."""
        return DataLoader(self.data.test, batch_size=500)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "digits": load_digits,
    "mnist1d": load_cnn,
    "mnist1d-transformer": load_transformer,
    "synthetic": load_synthetic,
}


def load_problem(name: str, forget: tuple[str, float], seed: int = 0) -> tuple[Problem, Data]:
    """Return a set and what is forgotten of it.

    Args:
        name: One of PROBLEMS.
        forget: Kind and amount, see `choose_forget`: ("class", 5), ("random", 0.1), ("mixture", 0.25).
        seed: Draws the samples to forget. All repetitions forget the same ones.
    """
    problem = PROBLEMS[name]()
    return problem, split_data(problem.train, problem.val, problem.test, forget, seed)
