"""What the functions take: tensors, arrays or lists, widened to float64, checked once at the door."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hamu_lightning.checks import describe
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import widest_float


def as_numbers(name: str, values: Any, device: torch.device) -> Tensor:
    """Return a tensor, an array or a list of real numbers as a tensor, detached; Python's numbers keep their digits.

    Args:
        name: The argument's name, as its caller knows it.
        values: What was given.
        device: Where it goes if it is no tensor.

    Raises:
        HAMUValueError: If these are no real numbers.

    Example:
        >>> as_numbers("losses", [0.5, 2], torch.device("cpu"))
        tensor([0.5000, 2.0000], dtype=torch.float64)
    """
    if not isinstance(values, Tensor):
        dtype = None if hasattr(values, "dtype") else widest_float(device)
        try:
            values = torch.as_tensor(values, dtype=dtype, device=device)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise HAMUValueError(f"Expected `{name}` to hold numbers, but got {describe(values)}.") from error
    if values.is_complex():
        raise HAMUValueError(f"Expected `{name}` to hold real numbers, but got {describe(values)}.")
    numbers: Tensor = values.detach()
    return numbers


def as_wide(name: str, values: Any, dims: int, shape: str) -> Tensor:
    """Numbers of so many dimensions in the widest float."""
    numbers = as_numbers(name, values, torch.device("cpu"))
    if numbers.ndim != dims:
        raise HAMUValueError(f"Expected `{name}` to be of shape {shape}, but got {list(numbers.shape)}.")
    return numbers.to(widest_float(numbers.device))


def as_vector(name: str, values: Any) -> Tensor:
    """One number per sample, `[N]`."""
    return as_wide(name, values, 1, "[N], one number per sample")


def as_matrix(name: str, values: Any) -> Tensor:
    """One number per model and sample, `[M, N]`."""
    return as_wide(name, values, 2, "[M, N], one number per model and sample")


def as_log_probs(name: str, scores: Any) -> Tensor:
    """Logits or log-probabilities `[N, K]` as log-probabilities: those stay what they are."""
    wide = as_wide(name, scores, 2, "[N, K], logits or log-probabilities")
    if wide.shape[1] < 2:
        raise HAMUValueError(
            f"Expected `{name}` to have at least 2 classes, but got shape {list(wide.shape)}. "
            "Of one logit `z` of a binary model make two: `torch.stack([torch.zeros_like(z), z], dim=1)`."
        )
    return wide.log_softmax(dim=1)


def as_labels(labels: Any, scores: Tensor) -> Tensor:
    """One class per sample of `scores`, `[N]`."""
    numbers = as_numbers("labels", labels, scores.device)
    n, k = scores.shape
    if not isinstance(labels, Tensor) and bool((numbers == numbers.long()).all()):
        numbers = numbers.long()
    if numbers.shape != (n,) or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise HAMUValueError(
            f"Expected `labels` to be integers of shape [{n}], one class per sample, but got {numbers.dtype} of shape "
            f"{list(numbers.shape)}."
        )
    return numbers.to(scores.device).long()


def as_texts(logits: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Return logits `[N, T, V]` and labels `[N, T]` as tensors on one device.

    Raises:
        HAMUValueError: If the shapes are others, or the labels no integers.

    Example:
        >>> [tuple(x.shape) for x in as_texts(torch.zeros(1, 2, 3), [[0, -100]])]
        [(1, 2, 3), (1, 2)]
    """
    scores = as_numbers("logits", logits, torch.device("cpu"))
    classes = as_numbers("labels", labels, scores.device)
    if not isinstance(labels, Tensor) and bool((classes == classes.long()).all()):
        classes = classes.long()
    if scores.ndim != 3 or classes.shape != scores.shape[:2] or classes.is_floating_point():
        raise HAMUValueError(
            f"Expected `logits` to be of shape [N, T, V] and `labels` to be integers of shape [N, T], but got "
            f"{list(scores.shape)} and {classes.dtype} of shape {list(classes.shape)}. Move the labels by one "
            "position, so that labels[n, t] is what logits[n, t] should predict."
        )
    return scores, classes.to(scores.device).long()


def check_classes(labels: Tensor, scores: Tensor) -> None:
    """Raise unless all labels are classes. It reads them on the host."""
    if not bool(((labels >= 0) & (labels < scores.shape[1])).all()):
        raise HAMUValueError(
            f"Expected `labels` to be classes from 0 to {scores.shape[1] - 1}, but got others. "
            "Leave out samples with an ignored label such as -100."
        )


def as_pool(references: Any, like: Tensor) -> list[Tensor]:
    """References as a list of log-probabilities of the shape of `like`: one `[N, K]`, or `M` of them."""
    if isinstance(references, Tensor) or hasattr(references, "dtype"):
        members = [references] if references.ndim == 2 else list(references) if references.ndim == 3 else None
    else:
        members = list(references) if isinstance(references, Sequence) and not isinstance(references, str) else None
    if members is None:
        raise HAMUValueError(
            "Expected `references` to be of shape [N, K], or a list of such, one per reference model, but got "
            f"{describe(references)}."
        )
    pool = [as_log_probs("references", member).to(like.device) for member in members]
    for member in pool:
        check_same_shape("references", member, like)
    return pool


def check_same_shape(name: str, given: Tensor, like: Tensor) -> None:
    """Raise unless a tensor has the samples and classes of another."""
    if given.shape != like.shape:
        raise HAMUValueError(
            f"Expected `{name}` to be of shape {list(like.shape)}, as the model's own, but got {list(given.shape)}. "
            "Ask both models about the same samples in the same order."
        )
