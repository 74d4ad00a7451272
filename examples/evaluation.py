"""How the quickstart measures a model: accuracies, membership inference, distance from retrained models; the table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from hamu_lightning.metrics import MembershipAUC
from hamu_lightning.metrics.functional import average_gap, js_to_references, match_classes


class Samples(NamedTuple):
    """What a model says about `N` samples of `K` classes."""

    logits: Tensor
    """`[N, K]`."""
    labels: Tensor
    """`[N]`."""

    def select(self, index: Tensor) -> Samples:
        """Return some of the samples."""
        return Samples(*(values[index] for values in self))

    @property
    def losses(self) -> Tensor:
        """The cross-entropies, `[N]`."""
        return F.cross_entropy(self.logits, self.labels, reduction="none")

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.losses.mean().item()

    @property
    def accuracy(self) -> float:
        """Share of samples that are classified right."""
        return (self.logits.argmax(dim=1) == self.labels).double().mean().item()


class Row(NamedTuple):
    """One line of the table: what a model does with the samples of each set."""

    name: str
    retain: Samples
    forget: Samples
    test: Samples
    """Without the classes that are forgotten as a whole."""
    auc: float
    """Of the membership test by loss: forget samples against test samples of the same classes."""

    @property
    def numbers(self) -> dict[str, float]:
        """What the gap is taken of, as fractions."""
        accuracies = {"RA": self.retain.accuracy, "UA": 1 - self.forget.accuracy, "TA": self.test.accuracy}
        return {**accuracies, "MIA": self.auc}

    def gap(self, retrained: Sequence[Row]) -> float:
        """Return the average gap to the retrained models that are not this one, a fraction."""
        return mean(float(average_gap(self.numbers, other.numbers)) for other in retrained if other is not self)

    def js(self, retrained: Sequence[Row]) -> float:
        """Return the Jensen-Shannon divergence from their predictions on the forget set, as a share of its maximum."""
        others = [other.forget.logits for other in retrained if other is not self]
        return float(js_to_references(self.forget.logits, others))


def evaluate(module: LightningModule, dataset: Dataset[Any]) -> Samples:
    """Run a model on a whole dataset, in evaluation mode."""
    images, labels = next(iter(DataLoader(dataset, batch_size=len(dataset))))  # type: ignore[arg-type]
    was_training = module.training
    module.eval()
    with torch.no_grad():
        logits = module(images)
    module.train(was_training)
    return Samples(logits, labels)


def make_row(name: str, retain: Samples, forget: Samples, test: Samples, gone: list[int]) -> Row:
    """Put the numbers of a model together.

    Args:
        name: Name of the model.
        retain: What it says about the retain set.
        forget: About the forget set.
        test: About the test set, which also serves as the held-out samples of the membership test.
        gone: The classes that are forgotten as a whole.
    """
    auc = MembershipAUC()
    auc.update(forget.losses, is_member=True)
    auc.update(test.select(match_classes(test.labels, like=forget.labels)).losses, is_member=False)
    others = test.select(~torch.isin(test.labels, torch.tensor(gone, dtype=torch.long)))
    return Row(name, retain, forget, others, float(auc.compute()))


def format_table(rows: Sequence[Row], retrained: Sequence[Row], gone: list[int]) -> str:
    """Return the table as text, 80 columns wide.

    Args:
        rows: The models.
        retrained: Those of them that the others are measured by, and each other.
        gone: The classes that are forgotten as a whole.
    """
    without = f"without {','.join(map(str, gone))}" if gone else ""
    titles = (
        ("retain", "forgotten", "test acc." if gone else "test", "membership", "gap to", "JS to"),
        ("acc. %", "acc. %", without or "acc. %", "AUC", "retrained", "retrained"),
    )
    widths, lines = (8, 11, 11, 12, 11, 10), []
    for line in titles:
        lines.append(" " * 17 + "".join(f"{title:>{width}}" for title, width in zip(line, widths, strict=True)))
    for row in rows:
        accuracies = [f"{100 * part.accuracy:.1f}" for part in (row.retain, row.forget, row.test)]
        cells = (*accuracies, f"{row.auc:.3f}", f"{100 * row.gap(retrained):.1f}", f"{100 * row.js(retrained):.1f}")
        lines.append(f"{row.name:<17}" + "".join(f"{c:>{width}}" for c, width in zip(cells, widths, strict=True)))
    return "\n".join(lines)
