"""How sure a model is of a label: its log-odds, of one batch and of a whole set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives._base import BatchPass, Objective
from hamu_lightning.objectives._outputs import Outputs
from hamu_lightning.objectives._prediction import has_one_logit, make_prediction
from hamu_lightning.objectives._reference import Reference, evaluating

_CURE = (
    "For a regression, several labels per sample, or shares of classes give the loss where the forget set should end, "
    "or Holdout(data); what else is a class is made one by `outputs=`, a function of the module and the batch that "
    "returns logits and labels."
)


def log_odds(logits: Tensor, chosen: Tensor) -> Tensor:
    """log(p/(1-p)) of some classes together, without computing p.

    Args:
        logits: `[..., C]`.
        chosen: Which classes, bool `[..., C]` or `[C]`.

    Returns:
        `[...]`, in nats.

    Example:
        >>> log_odds(torch.tensor([2.0, 0.0]), torch.tensor([True, False]))
        tensor(2.)
    """
    inside = logits.masked_fill(~chosen, -math.inf).logsumexp(-1)
    return inside - logits.masked_fill(chosen, -math.inf).logsumexp(-1)


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise unless labels are numbers of classes; reads the host.

    Raises:
        HAMUValueError: If one is out of range.
    """
    if labels.numel() and not bool(((labels >= 0) & (labels < classes)).all()):
        raise HAMUValueError(
            f"Expected labels in 0 .. {classes - 1}, the classes of the model's output, but some are outside. Where "
            "they mean `nothing to predict`, make them -100 by `outputs=`, a function of the module and the batch."
        )


def is_label_of(labels: Tensor, classes: int) -> Tensor:
    """Where the label is among the classes: bool `[..., C]` for labels `[...]`."""
    return labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)


def log_odds_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-odds of labels `[...]` under logits `[..., C]`, nats."""
    return log_odds(logits, is_label_of(labels, logits.shape[-1]))


@dataclass(frozen=True)
class ClassOutputs:
    """Outputs with class labels: 0.0 and 1.0 of a model with one logit become classes.

    Args:
        given: What is asked.
    """

    given: Outputs

    def __call__(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return logits and labels."""
        logits, labels = self.given(module, batch)
        is_answer = has_one_logit(logits, labels) and not labels.is_complex()
        return logits, labels.long() if is_answer else labels


class ClassReader(Objective):
    """Reads what classes a set has, and how sure the reference is of them; itself it is 0, without a gradient.

    Args:
        reference: Whose log-odds are read; None for the labels alone.
        outputs: How to ask the models.

    Attributes:
        classes: How many classes the outputs have; 0 before the first batch.
        is_sequence: Whether each sample is a sequence, such as a text.
        has_places: Whether a sample has more than one label, as sequences and images have.

    Raises:
        HAMUValueError: If (at a batch) labels are no classes.
    """

    def __init__(self, reference: Reference | None, outputs: ClassOutputs) -> None:
        self._reference, self._outputs = reference, outputs
        self._log_odds: list[Tensor] = []
        self._labels: list[Tensor] = []
        self.classes, self.is_sequence, self.has_places = 0, False, False

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        with torch.no_grad():
            with evaluating(batch.module):
                logits, labels = self._outputs.given(batch.module, batch.batch)
            check_classes(logits, labels)
            prediction = make_prediction(logits, labels.long())
            self.classes, self.is_sequence = prediction.logits.shape[-1], prediction.is_sequence
            self.has_places = prediction.labels.shape[1] > 1
            labels = prediction.labels[prediction.mask]
            check_labels(labels, self.classes)
            self._labels.append(labels.cpu())
            if self._reference is not None:
                original = self._reference.logits_for(prediction, batch, self._outputs)
                found = prediction.by_rows(log_odds_of_labels, logits=original)
                self._log_odds.append(found[prediction.mask].cpu())
            return torch.zeros(len(prediction.labels), device=labels.device)

    @property
    def labels(self) -> Tensor:
        """All labels, int64 `[n]`."""
        return torch.cat(self._labels)

    @property
    def log_odds(self) -> Tensor:
        """The reference's log-odds of them, `[n]`."""
        return torch.cat(self._log_odds)

    def for_labels(self) -> ClassReader:
        """A fresh reader of labels alone."""
        return ClassReader(None, self._outputs)

    def count(self) -> Tensor:
        """How often each class occurs, int64 `[C]`."""
        return torch.bincount(self.labels, minlength=self.classes)


def check_classes(logits: Tensor, labels: Tensor) -> None:
    """Raise unless outputs are about classes; reads the host.

    Raises:
        HAMUValueError: If labels are numbers.
    """
    is_answer = has_one_logit(logits, labels)
    if labels.is_complex() or (
        labels.is_floating_point() and not (is_answer and bool(((labels == 0) | (labels == 1)).all()))
    ):
        raise HAMUValueError(
            f"Expected labels that are classes, but got {labels.dtype} of shape {list(labels.shape)} for logits of "
            f"shape {list(logits.shape)}. {_CURE}"
        )
