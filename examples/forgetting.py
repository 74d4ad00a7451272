"""What is forgotten: all of a class, samples drawn at random, or a mixture of both."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from hamu_lightning import split_forget

MIXTURE_CLASS = 3


@dataclass(frozen=True)
class Data:
    """What to keep and what to forget of the training set, and two sets that are never trained on."""

    train: TensorDataset
    retain: Subset[Any]
    forget: Subset[Any]
    val: TensorDataset
    test: TensorDataset
    gone: list[int]
    """The classes that are forgotten as a whole."""

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(self.train.tensors[1].max()) + 1


def choose_forget(labels: Tensor, kind: str, amount: float, seed: int) -> list[int]:
    """Return the positions of the samples to forget.

    - class: all samples of the class `amount`.
    - random: the share `amount` of all samples, drawn at random.
    - mixture: as many samples as MIXTURE_CLASS has. `amount` is the paper's rho: this share of them is drawn at random
      from all samples, the rest from that class. 0 is the class, 1 is a random draw. Here is where rho is counted; the
      draw at random is from the samples that are left, those of the class among them.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if kind == "class":
        return (labels == int(amount)).nonzero().flatten().tolist()
    if kind == "random":
        return order[: round(amount * len(labels))].tolist()
    of_class = order[labels[order] == MIXTURE_CLASS]
    chosen = of_class[: round((1 - amount) * len(of_class))]
    others = order[~torch.isin(order, chosen)]
    return torch.cat((chosen, others[: len(of_class) - len(chosen)])).tolist()


def split_data(
    train: TensorDataset, val: TensorDataset, test: TensorDataset, forget: tuple[str, float], seed: int
) -> Data:
    """Split the training set into what to retain and what to forget.

    Args:
        train: Training data, a TensorDataset `(x, y)`.
        val: Kept as it is.
        test: Kept as it is.
        forget: Kind and amount, see `choose_forget`.
        seed: Of the draw.
    """
    labels = train.tensors[1]
    retain, forgotten = split_forget(train, choose_forget(labels, *forget, seed))
    gone = set(labels.tolist()) - set(labels[retain.indices].tolist())
    return Data(train, retain, forgotten, val, test, sorted(gone))


def parse_forget(text: str, classes: int = 10) -> tuple[str, float]:
    """Read `class:3` or `random:0.1`."""
    kind, _, number = text.partition(":")
    limits = {"class": (0, classes - 1), "random": (0.01, 0.9)}
    if kind not in limits or not limits[kind][0] <= float(number) <= limits[kind][1]:
        raise argparse.ArgumentTypeError(
            f"expected class:0 .. class:{classes - 1} or random:0.01 .. random:0.9, but got {text}"
        )
    return kind, float(number)


def parse_rho(text: str) -> tuple[str, float]:
    """Read a share from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, but got {text}")
    return "mixture", float(text)
