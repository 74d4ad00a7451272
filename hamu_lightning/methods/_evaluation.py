"""What a classifier does with the samples of each set, and how far that is from another model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from hamu_lightning.methods._fisher import looking, on_device
from hamu_lightning.metrics import MembershipAUC
from hamu_lightning.metrics.functional import match_classes

GAPS = ("UA", "RA", "TA", "MIA")


class Samples(NamedTuple):
    """What a classifier says about `N` samples, on the host."""

    log_probs: Tensor
    """`[N, K]`, nats."""
    labels: Tensor
    """`[N]`."""

    @property
    def losses(self) -> Tensor:
        """`[N]`, the cross-entropies, nats."""
        return -self.log_probs.gather(1, self.labels[:, None])[:, 0]

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats."""
        return self.losses.mean().item()

    @property
    def accuracy(self) -> float:
        """Share of samples that are classified right."""
        return (self.log_probs.argmax(dim=1) == self.labels).double().mean().item()

    def select(self, index: Tensor) -> Samples:
        """Return some of the samples."""
        return Samples(self.log_probs[index], self.labels[index])


@dataclass(frozen=True)
class Parts:
    """The four sets, each a loader that yields each sample once, in order.

    Args:
        retain: Training data to keep.
        forget: Training data to forget.
        val: Never trained on; for tuning.
        test: Never trained on and not for tuning.
    """

    retain: Iterable[Any]
    forget: Iterable[Any]
    val: Iterable[Any]
    test: Iterable[Any]


class Seen(NamedTuple):
    """What a classifier says about the samples of each set."""

    retain: Samples
    forget: Samples
    val: Samples
    test: Samples


def evaluate(module: LightningModule, batches: Iterable[Any]) -> Samples:
    """Run a classifier over batches `(x, y)` in evaluation mode; nothing in it is changed."""
    log_probs, labels = [], []
    with looking(module), torch.no_grad():
        for x, y in on_device(module, batches):
            log_probs.append(module(x).double().log_softmax(dim=1).cpu())
            labels.append(y.cpu())
    return Samples(torch.cat(log_probs), torch.cat(labels))


def evaluate_parts(module: LightningModule, parts: Parts) -> Seen:
    """Run a classifier over all four sets."""
    return Seen(*(evaluate(module, batches) for batches in (parts.retain, parts.forget, parts.val, parts.test)))


def measure(seen: Seen, retrained: Seen) -> dict[str, float]:
    """Return the numbers of a model. Accuracies and AUC are fractions, losses and KL nats.

    - UA: 1 - accuracy on the forget set. RA, TA: accuracy on the retain and the test set.
    - MIA: area under the ROC curve of the membership attack by loss, forget samples against test samples of the same
      classes; NaN where one of these classes is not in the test set. 0.5 is chance.
    - KL: mean over the forget set of `sum_y p_R log(p_R / p_w)`, from the retrained model's `p_R` to the model's `p_w`.
    - retain_loss, forget_loss: mean losses.
    """
    auc = MembershipAUC()
    auc.update(seen.forget.losses, is_member=True)
    auc.update(seen.test.select(match_classes(seen.test.labels, like=seen.forget.labels)).losses, is_member=False)
    theirs, ours = retrained.forget.log_probs, seen.forget.log_probs
    return {
        "UA": 1 - seen.forget.accuracy,
        "RA": seen.retain.accuracy,
        "TA": seen.test.accuracy,
        "MIA": float(auc.compute()),
        "KL": (theirs.exp() * (theirs - ours)).sum(dim=1).mean().item(),
        "retain_loss": seen.retain.loss,
        "forget_loss": seen.forget.loss,
    }
