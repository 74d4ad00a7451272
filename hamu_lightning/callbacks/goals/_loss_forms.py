"""The usual losses of single samples, made of a module's output: which one it is, its own loss of a batch says."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_IGNORED = -100
# The module's own loss of a batch and ours are the same number up to rounding.
_TOLERANCE = 1e-3


class SampleRead(NamedTuple):
    """What a batch of `N` samples shows, on its device and in the dtype of the logits.

    Attributes:
        losses: `[N]`, the loss of each sample.
        places: `[N]`, over how many places each loss is a mean.
        recognised: `[N]`: 1 where the model gives the label, else 0, of a sequence the share; None where unknown.
        classes: `[N]`, integers: the class of each sample; None where it has not one alone.
    """

    losses: Tensor
    places: Tensor
    recognised: Tensor | None
    classes: Tensor | None = None


def find_form(logits: Tensor, labels: Tensor, own: float) -> str | None:
    """Which of the usual losses gives the module's own loss of a batch, by its name; None where none does.

    Args:
        logits: The module's output.
        labels: The labels.
        own: The module's own loss of the batch.
    """
    return next((form for form in FORMS if _gives(form, logits, labels, own)), None)


def _gives(form: str, logits: Tensor, labels: Tensor, own: float) -> bool:
    try:
        read = FORMS[form](logits, labels)
    except Exception:  # numbers that are no classes
        return False
    return read is not None and agrees(read, own)


def agrees(found: SampleRead, own: float) -> bool:
    """Whether the module's own loss of the batch is the mean over samples, or over all places."""
    means = float(found.losses.mean()), float((found.losses * found.places).sum() / found.places.sum())
    return any(abs(mean - own) <= _TOLERANCE * max(abs(own), _TOLERANCE) for mean in means)


def _of_classes(logits: Tensor, labels: Tensor) -> SampleRead | None:
    """Logits `[N, C, ...]` with one class for each place `[N, ...]`."""
    if labels.is_floating_point() or logits.ndim < 2 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        return None
    losses = F.cross_entropy(logits, labels.long(), reduction="none", ignore_index=_IGNORED)
    read = _over_places(losses, logits.argmax(dim=1) == labels, labels != _IGNORED)
    return read._replace(classes=labels) if labels.ndim == 1 else read


def _of_tokens(logits: Tensor, labels: Tensor) -> SampleRead | None:
    """Logits `[N, T, V]` with labels `[N, T]`."""
    return None if logits.ndim < 3 else _of_classes(logits.movedim(-1, 1), labels)


def _of_shares(logits: Tensor, labels: Tensor) -> SampleRead | None:
    """Logits `[N, C]` with a share for each class."""
    if not labels.is_floating_point() or labels.shape != logits.shape or logits.ndim != 2:
        return None
    losses = F.cross_entropy(logits, labels.to(logits), reduction="none")
    return SampleRead(losses, torch.ones_like(losses), (logits.argmax(dim=1) == labels.argmax(dim=1)).to(losses))


def _of_answers(logits: Tensor, labels: Tensor) -> SampleRead | None:
    """One logit for each yes-or-no label."""
    if labels.numel() != logits.numel() or labels.shape[:1] != logits.shape[:1]:
        return None
    labels = labels.reshape(logits.shape).to(logits)
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return _over_places(losses, (logits > 0) == (labels > 0.5), torch.ones_like(losses, dtype=torch.bool))


def _of_numbers(logits: Tensor, labels: Tensor) -> SampleRead | None:
    """The squared error."""
    if labels.numel() != logits.numel() or labels.shape[:1] != logits.shape[:1]:
        return None
    errors = (logits - labels.reshape(logits.shape).to(logits)).square().reshape(len(logits), -1)
    return SampleRead(errors.mean(dim=1), torch.full_like(errors[:, 0], errors.shape[1]), None)


def _over_places(losses: Tensor, is_right: Tensor, mask: Tensor) -> SampleRead:
    """The mean over the places of each sample."""
    losses, is_right, mask = (x.reshape(len(x), -1).to(losses) for x in (losses, is_right, mask))
    places = mask.sum(dim=1)
    means = ((x * mask).sum(dim=1) / places.clamp(min=1) for x in (losses, is_right))
    losses, recognised = means
    return SampleRead(losses, places, recognised)


FORMS: dict[str, Callable[[Tensor, Tensor], SampleRead | None]] = {
    "cross-entropy": _of_classes,
    "cross-entropy of tokens": _of_tokens,
    "cross-entropy of shares": _of_shares,
    "cross-entropy of answers": _of_answers,
    "squared error": _of_numbers,
}
