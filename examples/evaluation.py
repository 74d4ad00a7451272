"""How the quickstart measures a model: losses, accuracies, membership inference, and the table of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from hamu_lightning.metrics import MembershipAUC


class Samples(NamedTuple):
    """What a model does with some samples, `[N]` each."""

    losses: Tensor
    hits: Tensor
    labels: Tensor

    def select(self, index: Tensor) -> Samples:
        """Return some of the samples."""
        return Samples(*(values[index] for values in self))

    @property
    def loss(self) -> float:
        """Mean loss."""
        return self.losses.mean().item()

    @property
    def accuracy(self) -> float:
        """Share of samples that are classified right."""
        return self.hits.double().mean().item()


class Row(NamedTuple):
    """One line of the table."""

    name: str
    retain: Samples
    forget: Samples
    test: Samples
    others: Samples
    """Test samples of the classes that are not forgotten as a whole."""
    auc: float
    interval: tuple[float, float]


def evaluate(module: LightningModule, dataset: Dataset[Any]) -> Samples:
    """Run a model on a whole dataset, in evaluation mode."""
    images, labels = next(iter(DataLoader(dataset, batch_size=len(dataset))))  # type: ignore[arg-type]
    was_training = module.training
    module.eval()
    with torch.inference_mode():
        logits = module(images)
    module.train(was_training)
    return Samples(F.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=1) == labels, labels)


def match_classes(labels: Tensor, like: Tensor) -> Tensor:
    """Return the positions of as many samples as possible whose classes have the same shares as in `like`."""
    classes = int(torch.cat((labels, like)).max()) + 1
    wanted, there = torch.bincount(like, minlength=classes), torch.bincount(labels, minlength=classes)
    times = float((there / wanted)[wanted > 0].min())
    return torch.cat([(labels == c).nonzero().flatten()[: round(times * int(wanted[c]))] for c in range(classes)])


def make_row(name: str, retain: Samples, forget: Samples, test: Samples, gone: list[int]) -> Row:
    """Put the numbers of a model together.

    Args:
        name: Name of the model.
        retain: Its losses on the retain set.
        forget: On the forget set.
        test: On the test set, which also serves as the held-out samples of the membership test.
        gone: The classes that are forgotten as a whole.
    """
    auc = MembershipAUC()
    auc.update(forget.losses, is_member=True)
    auc.update(test.select(match_classes(test.labels, like=forget.labels)).losses, is_member=False)
    low, high = auc.interval()
    others = test.select(~torch.isin(test.labels, torch.tensor(gone, dtype=torch.long)))
    return Row(name, retain, forget, test, others, float(auc.compute()), (float(low), float(high)))


def format_table(rows: Sequence[Row], gone: list[int]) -> str:
    """Return the table as text. Accuracies are in percent."""
    has_others = bool(gone)
    titles = f"{'':<10}" + "".join(f"  {title:^15}" for title in ("retain", "forget", "test"))
    units = f"{'':<10}" + f"  {'loss':>8} {'acc.':>6}" * 3
    if has_others:
        titles, units = f"{titles}  {'test acc.':>9}", f"{units}  {'without ' + ','.join(map(str, gone)):>9}"
    lines = [f"{titles}  membership AUC", f"{units}  (95 % interval)"]
    for row in rows:
        pairs = "".join(f"  {s.loss:8.2g} {100 * s.accuracy:6.1f}" for s in (row.retain, row.forget, row.test))
        others = f"  {100 * row.others.accuracy:9.1f}" if has_others else ""
        lines.append(f"{row.name:<10}{pairs}{others}  {row.auc:.3f} ({row.interval[0]:.3f} to {row.interval[1]:.3f})")
    return "\n".join(lines)
