"""What a module says of the places of a batch, in one form for classes and for tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives._outputs import CURE, IGNORED
from hamu_lightning.objectives._rows import RowFunction, map_rows

# Brings logits into the form `[N, T, V]`.
Form: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sequences:
    """Which sequence each place of a packed batch belongs to; those without a label do not count.

    Attributes:
        numbers: int64 `[M]`, of the places that have a label, in order.
        count: How many sequences there are.
    """

    numbers: Tensor
    count: int


@dataclass(frozen=True)
class Prediction:
    """Logits and labels of N samples with T places each; a class per sample is one place.

    Attributes:
        logits: `[N, T, V]` as the model returned them, in their own dtype; what stands where `mask` is False is no
            number of ours. `by_rows` reads them.
        labels: `[N, T]`, 0 where `mask` is False.
        mask: `[N, T]`, bool: where there is something to predict.
        form: Brings logits as a model returns them into that of `logits`.
        sequences: Where the samples are several sequences in a row; None where each row is a sample.
    """

    logits: Tensor
    labels: Tensor
    mask: Tensor
    form: Form
    sequences: Sequences | None = None

    @property
    def is_sequence(self) -> bool:
        """Whether each sample is a sequence, `[N, T, V]` as it was."""
        return self.form is _as_it_is

    @property
    def is_answer(self) -> bool:
        """Whether the model gave one number for each sample, read as the logit of yes or no."""
        return self.form is _as_two_classes

    def align(self, logits: Tensor) -> Tensor:
        """Bring the logits of another model for the same batch into the form of `logits`."""
        places = self.form(logits)
        if places.shape != self.logits.shape:
            raise HAMUValueError(
                f"Expected the other model's logits to be of shape {list(self.logits.shape)}, but got "
                f"{list(places.shape)}. Both models need the same classes, and samples padded to the same length."
            )
        return places

    def by_rows(self, function: RowFunction, *others: Tensor, logits: Tensor | None = None) -> Tensor:
        """Compute a number for each place, `[N, T]`, without a copy of all logits; no number where there is no label.

        Args:
            function: Of logits `[..., V]`, labels `[...]` and others' logits, float32 or wider, 0 where there is no
                label.
            *others: Logits of other models, of the form of `logits`.
            logits: Those of another model in the place of the module's.
        """
        return map_rows(function, self.logits if logits is None else logits, self.labels, self.mask, *others)

    def log_likelihoods(self, logits: Tensor | None = None) -> Tensor:
        """The log p of each label, `[N, T]` in nats, 0 where there is none; `logits` may be those of another model."""
        return torch.where(self.mask, self.by_rows(log_p_of_labels, logits=logits), 0.0)

    def mean_over_places(self, values: Tensor) -> Tensor:
        """The mean of `[N, T]` over each sample's places, `[N]`; 0 for a sample without one."""
        return self.sum_over_places(values) / self.count_places().clamp(min=1)

    def sum_over_places(self, values: Tensor) -> Tensor:
        """The sum of `[N, T]` over each sample's places, `[N]`."""
        if self.sequences is None:
            return torch.where(self.mask, values, 0.0).sum(1)
        sums = values.new_zeros(self.sequences.count)
        return sums.index_add(0, self.sequences.numbers, values[self.mask])

    def count_places(self) -> Tensor:
        """How many places of each sample have a label, int64 `[N]`."""
        if self.sequences is None:
            return self.mask.sum(1)
        return torch.bincount(self.sequences.numbers, minlength=self.sequences.count)


def log_p_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """The log p of labels `[...]` under logits `[..., V]`, nats."""
    # Not log_softmax: it would keep a second tensor of the size of the logits.
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `[N, T]` over each sample's places where `mask` is True, `[N]`; 0 for a sample without one."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def make_prediction(logits: Tensor, labels: Tensor, sequences: Tensor | None = None) -> Prediction:
    """Check what `outputs` returned, and bring it into one form.

    Args:
        logits: The module's.
        labels: The labels.
        sequences: The number of the sequence of each place, `[N, T]`; None where each row is one sample.

    Raises:
        HAMUValueError: If shapes do not fit, or labels are not classes.
    """
    form = _find_form(logits, labels)
    if form is None:
        raise HAMUValueError(
            "Expected logits [N, C] with labels [N], or logits [N, T, V] with labels [N, T], but got shapes "
            f"{list(logits.shape)} and {list(labels.shape)}. {CURE}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise HAMUValueError(f"Expected the labels to be classes, integers, but got {labels.dtype}. {CURE}")
    labels = labels.reshape(len(labels), -1)  # [N, T], with one class per sample [N, 1]
    mask = labels != IGNORED
    found = _count_sequences(sequences, mask) if form is _as_it_is and sequences is not None else None
    return Prediction(form(logits), torch.where(mask, labels, 0).long(), mask, form, found)


def _count_sequences(numbers: Tensor, mask: Tensor) -> Sequences:
    known, places = torch.unique(numbers[mask], return_inverse=True)
    return Sequences(places, max(len(known), 1))


def has_one_logit(logits: Tensor, labels: Tensor) -> bool:
    """Whether a model says yes or no by one logit per sample: `[N]` or `[N, 1]`, with as many labels."""
    shapes = ((len(logits),), (len(logits), 1)) if logits.dim() else ()
    return tuple(logits.shape) in shapes and tuple(labels.shape) in shapes


def _find_form(logits: Tensor, labels: Tensor) -> Form | None:
    """What brings logits into the form `[N, T, V]`; None where labels do not fit to them."""
    if has_one_logit(logits, labels):
        return _as_two_classes
    if logits.dim() == 2 and labels.shape == logits.shape[:1]:
        return _as_one_place
    if logits.dim() == 3 and labels.shape == logits.shape[:2]:
        return _as_it_is
    if logits.dim() > 2 and labels.shape == (logits.shape[0], *logits.shape[2:]):
        return _as_places
    return None


def _as_it_is(logits: Tensor) -> Tensor:
    return logits


def _as_one_place(logits: Tensor) -> Tensor:
    return logits.unsqueeze(1)  # [N, 1, C]


def _as_two_classes(logits: Tensor) -> Tensor:
    logits = logits.reshape(len(logits), -1)
    return torch.stack((torch.zeros_like(logits), logits), dim=-1)  # [N, 1, 2]


def _as_places(logits: Tensor) -> Tensor:
    return logits.flatten(2).transpose(1, 2)  # [N, C, ...] to [N, T, C]
