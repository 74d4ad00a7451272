"""Where the forget loss should end: measured at the model itself, in the unit of the forget loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hamu_lightning.callbacks.passes import HoldsData
from hamu_lightning.checks import check_choice, check_count, check_number, check_optional, describe, is_iterable, store
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.objectives import Objective

# From this share of a target on it counts as reached: what is left is less than one batch can tell. Judged in
# `Approach.is_at_target`.
REACHED = 0.95


class Target(ABC):
    """A level for the forget loss that is measured rather than known.

    Attributes:
        every: Measured again after so many combined steps; None: once, at the start.
        objective: What is raised to come to it; None for the loss, or the objective that the user chose.
        data: Held-out data, where `has_held_out`.
        transform_like: "holdout": the forget set goes through the transforms of these; "forget": these through its.
        what: What is to come to it, in words.
        by_objective: Whether it is a level of what is raised, and not of the module's own loss.
    """

    what: ClassVar[str] = "forget loss"
    by_objective: ClassVar[bool] = False
    every: int | None = None
    objective: Objective | None = None
    data: Any = None
    transform_like: Literal["forget", "holdout"] | None = None

    @property
    def has_held_out(self) -> bool:
        """Whether `data` are held-out data, with which forgotten samples are compared one by one."""
        return False

    @abstractmethod
    def measure(self, module: nn.Module, mean_loss: Callable[[Iterable[Any]], Tensor], batch: Any) -> Tensor | float:
        """Measure the level.

        Args:
            module: The module, in evaluation mode.
            mean_loss: Gives the module's own training loss on the batches of a loader, mean over samples, without
                leaving a trace. A Dataset is loaded like the training data; None stands for the Trainer's validation
                data.
            batch: A batch of the retain stream, on the device.

        Returns:
            0-d, in the unit of the loss.
        """


@dataclass(frozen=True)
class Holdout(HoldsData, Target):
    """The model's own loss on data that it was never trained on.

    The right target for *samples*: forgotten samples should look like samples that the model never saw, no better and
    no worse. Then a test of membership by the loss finds nothing. The level is measured again as the model changes.
    Each measurement takes one forward pass over the loader in each process, so a few hundred samples are best.

    The data should be of the distribution of the forget set, under the same transforms: for a mixture of classes the
    same mixture. For a class that is forgotten as a whole see `Chance`. The target is reached where the mean of the
    forget set has come to that of the data, and single samples do not speak against it: no attack by the loss tells
    forgotten samples from held-out ones beyond the 95 % interval of its AUC.

    Args:
        data: A DataLoader, another iterable of batches, or a Dataset (loaded like the training data, in batches of the
            same size); None for the Trainer's validation loader.
        every: Measured again after so many combined steps.
        transform_like: Whose transforms both sets go through (by the attribute `transform` of their Datasets, in a
            view: what is given stays as it is). "holdout": those of the held-out samples, for a forget set with
            augmentation: it is forgotten as it is without; "forget": those of the forget set. None: each its own.

    Raises:
        HAMUValueError: If the data is empty, `every` less than 1, or `transform_like` unknown; at the start of the fit
            if the Datasets have no `transform`.

    Example:
        >>> Holdout([("a batch",)], every=20).every
        20
    """

    data: Iterable[Any] | Dataset | None = field(default=None, repr=False)  # type: ignore[type-arg]  # for LightningCLI
    every: int | None = 10
    transform_like: Literal["forget", "holdout"] | None = None
    _data: ClassVar[tuple[str, ...]] = ("data",)

    def __post_init__(self) -> None:
        """Check the data."""
        store(self, every=check_optional(check_count, "every", self.every))
        check_held_out(self.data, self.transform_like)

    @property
    def has_held_out(self) -> bool:
        """Whether there are such data: always."""
        return True

    def measure(self, module: nn.Module, mean_loss: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """Return the mean loss on the held-out data."""
        return mean_loss(self.data)


@dataclass(frozen=True)
class Chance(Target):
    """The loss of a guess: the log of the number of classes, in nats.

    The right target for *a whole class* (or any set that the retrained model would know nothing of): the loss of a
    retrained model on it has no bound, since that model is confidently wrong (31.8 on the digits), and to be as wrong
    is not the aim; a model that guesses has forgotten.

    For cross-entropy over classes, and for yes-or-no labels (several per sample too), where a guess costs log 2 per
    label. A regression has no guess.

    Args:
        num_classes: None to count them in the module's own output on a batch: of `module(inputs)` for a batch
            `(inputs, labels)`, of `module(**batch).logits` for a dict. 2 for yes-or-no labels.

    Raises:
        HAMUValueError: If `num_classes` is less than 2.

    Example:
        >>> round(Chance(10).measure(None, None, None), 3)
        2.303
    """

    num_classes: int | None = None

    def __post_init__(self) -> None:
        """Check the number."""
        store(self, num_classes=check_optional(check_count, "num_classes", self.num_classes, least=2))

    def measure(self, module: nn.Module, mean_loss: Callable[[Iterable[Any]], Tensor], batch: Any) -> float:
        """Return the log of the number of classes."""
        return math.log(self.num_classes or count_classes(module, batch))


@dataclass(frozen=True)
class Measured(Target):
    """What a function of the module returns, measured once, at the start.

    Args:
        function: Takes the module, returns a number or a 0-d tensor in the unit of the loss.
    """

    function: Callable[[nn.Module], Tensor | float] = field(repr=False)

    def measure(self, module: nn.Module, mean_loss: Callable[[Iterable[Any]], Tensor], batch: Any) -> Tensor | float:
        """Return what the function returns."""
        return self.function(module)


@dataclass(frozen=True)
class ByObjective(Target):
    """A level of what is raised, in its own unit: not of the module's loss, by which other targets are judged.

    For an objective of at least 0, such as `ReferenceKL()`, whose end is known in its own unit.

    Args:
        target: A number, `Holdout(loader)` (the objective on held-out data), or a function of the module.

    Raises:
        HAMUValueError: If it is none of these.

    Example:
        >>> ByObjective(0.7)
        ByObjective(target=0.7)
    """

    target: Any
    by_objective: ClassVar[bool] = True
    what: ClassVar[str] = "objective"

    def __post_init__(self) -> None:
        """Check the target, and take over how it is measured."""
        target = as_target(self.target)
        if isinstance(target, Target):
            if target.by_objective:
                raise HAMUValueError(f"Expected a target in another unit than the objective's, but got {target}.")
            store(self, every=target.every, data=target.data, transform_like=target.transform_like)
        store(self, target=target)

    @property
    def has_held_out(self) -> bool:
        """Whether the target has held-out data."""
        return isinstance(self.target, Target) and self.target.has_held_out

    def measure(self, module: nn.Module, mean_loss: Callable[[Iterable[Any]], Tensor], batch: Any) -> Tensor | float:
        """Return the number, or measure it: `mean_loss` gives the objective."""
        return self.target.measure(module, mean_loss, batch) if isinstance(self.target, Target) else self.target


def check_held_out(data: object, transform_like: object) -> None:
    """Raise unless something, or None, can be held-out data, and be read so.

    Raises:
        HAMUValueError: Otherwise.
    """
    if transform_like is not None:
        check_choice("transform_like", transform_like, ("holdout", "forget"))
    if data is not None and not is_iterable(data):
        raise HAMUValueError(f"Expected `data` to be a DataLoader or a Dataset, but got {describe(data)}.")
    if isinstance(data, Sized) and len(data) == 0:
        raise HAMUValueError(
            f"Expected held-out data to measure the target on, but the {type(data).__name__} is empty."
        )


def as_target(target: Any) -> Target | float:
    """Return a number or a `Target` for what the user gave.

    Raises:
        HAMUValueError: If it is none of the things that can be a target.
    """
    if isinstance(target, Target):
        return target
    if callable(target) and not isinstance(target, type):
        return Measured(target)
    wanted = "a finite loss, Holdout(loader), Chance(), or a function of the module"
    cure = "A loss that can be negative has no target: give a quota, HAMUQ(quota=1e-3)."
    return check_number("target", check_number("target", target, wanted=wanted), least=0, cure=cure)


def count_classes(module: nn.Module, batch: Any) -> int:
    """The number of classes that the module tells apart, from its output on a batch.

    Raises:
        HAMUStateError: If that cannot be told.
    """
    try:
        with torch.no_grad():
            output = module(**batch) if isinstance(batch, Mapping) else module(_inputs(batch))
    except Exception as error:
        raise HAMUStateError(f"{UNKNOWN_CLASSES} The module raised {error!r}.") from error
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise HAMUStateError(f"{UNKNOWN_CLASSES} The output was {type(output).__name__}.")
    if are_answers(_labels(batch), logits):
        return 2
    if logits.ndim < 2:
        raise HAMUStateError(f"{UNKNOWN_CLASSES} The output has the shape {list(logits.shape)}.")
    if logits is output:
        return max(int(logits.shape[1]), 2)  # [N, C, ...], as for cross-entropy; one logit tells two classes apart
    return max(int(logits.shape[-1]), 2)


UNKNOWN_CLASSES = (
    "Expected to count classes in the output of `module(inputs)`, logits `[N, C, ...]`, but could not. "
    "Pass Chance(num_classes=...)."
)


def are_answers(labels: Any, logits: Tensor) -> bool:
    """Whether labels say yes or no for each logit; False where each sample has a class, or nothing is known of them.

    Raises:
        HAMUStateError: If they are numbers, as in a regression, or it cannot be told what they are.
    """
    if not isinstance(labels, Tensor):
        return False
    is_one_each = labels.numel() == logits.numel() and labels.shape[:1] == logits.shape[:1]
    if not is_one_each and not labels.is_floating_point():
        return False  # a class for each sample, or for each place
    if labels.is_complex() or not is_one_each or not bool(((labels >= 0) & (labels <= 1)).all()):
        raise HAMUStateError(
            "Expected labels with Chance(), the loss of a guess among classes, but they are numbers, as in a "
            "regression: there is no guess. Give the loss where the forget set should end, or Holdout(loader)."
        )
    is_sure = bool(((labels == 0) | (labels == 1)).all())
    is_shared_out = logits.ndim > 1 and logits.shape[1] > 1 and bool((labels.sum(dim=1) - 1).abs().max() < 1e-3)
    if is_shared_out and not is_sure:
        return False  # shares of classes, as label smoothing and mixtures make them
    if is_shared_out or not is_sure:
        raise HAMUStateError(
            "Expected to see what labels mean, for Chance(), but theirs could be a class in one-hot form, several "
            "answers, or numbers. Say it: Chance(num_classes=2) for yes-or-no labels, else the number of classes."
        )
    return True


def _labels(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return next((batch[name] for name in ("labels", "label", "targets", "target", "y") if name in batch), None)
    return batch[1] if isinstance(batch, Sequence) and len(batch) == 2 else None


def _inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, Sequence) else batch
