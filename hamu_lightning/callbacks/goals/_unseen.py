"""Targets that bring the answer to be given: what a model would say that never saw the samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from typing_extensions import override

from hamu_lightning.callbacks._refusal import HAMUMisconfigurationError
from hamu_lightning.callbacks.goals._surroundings import AnswerTarget, Surroundings
from hamu_lightning.callbacks.goals._targets import check_held_out
from hamu_lightning.callbacks.passes import HoldsData
from hamu_lightning.checks import check_count, check_type, store
from hamu_lightning.objectives import (
    ClassReader,
    FrozenCopy,
    Outputs,
    Reference,
    SecondAnswer,
    UnseenAnswer,
)


@dataclass(frozen=True)
class Unseen(HoldsData, AnswerTarget):
    """What a model says about samples that it never saw: the right target for samples and for whole classes.

    A retrained model answers a forgotten sample as it answers samples that it never saw. How sure of the label that is,
    is learnt from held-out samples of the same rank; what it says besides is the model's own second choice, or what a
    `teacher` says. What is raised is then not the module's loss but `hamu_lightning.objectives.UnseenAnswer`
    (docs/method.md#an-unseen-sample), in nats, from 0; the target is the mean distance over the forget set. There is
    nothing to tune.

    At the start of the fit one pass over the forget set and one over the held-out data, in evaluation mode, measure
    what is needed. A class of which no sample is in the retain data or a protected group goes as a whole; which share
    of the others is kept is counted as well: from the labels of the datasets (`targets`, `TensorDataset`, subsets of
    them), and where these cannot be read, by a pass over the data. A text (logits `[N, T, V]`) has no classes that go.
    Whole classes and samples of other classes are two groups, each with its own end:
    `target={"classes": Unseen(), "samples": Unseen(data)}`.

    Args:
        data: Data that the model was never trained on, as for `Holdout`: a DataLoader, another iterable of batches, or
            a Dataset (loaded like the training data). None for the Trainer's validation loader; not read where only
            whole classes are forgotten.
        teacher: A model that never saw what is to be forgotten, such as the one before fine-tuning, or a reference such
            as `AdaptersDisabled()`: it says what to answer in the place of the second choice. Its logits are of the
            same form.
        transform_like: "holdout" for a forget set without its augmentation, under the transforms of the held-out data;
            "forget" for held-out data under those of the forget set; see `Holdout`.
        counts: How many samples of each class stay, where they cannot be counted; 0 for a class that goes as a whole.
            Classes that are not named stay as they are.
        reference: The model before unlearning; default: a frozen copy.
        outputs: How to ask the models about a batch; see `hamu_lightning.objectives.Outputs`.

    Raises:
        HAMUValueError: If the data is empty, or an argument of another kind.

    Example:
        >>> Unseen([("a batch",)]), Unseen(counts={3: 0})
        (Unseen(counts=None), Unseen(counts={3: 0}))
    """

    data: Iterable[Any] | Dataset | None = field(default=None, repr=False)  # type: ignore[type-arg]  # for LightningCLI
    teacher: Any = field(default=None, repr=False, kw_only=True)
    transform_like: Literal["forget", "holdout"] | None = field(default=None, repr=False, kw_only=True)
    counts: Mapping[int, int] | None = field(default=None, kw_only=True)
    reference: Reference | None = field(default=None, repr=False, kw_only=True)
    outputs: Outputs | None = field(default=None, repr=False, kw_only=True)
    objective: UnseenAnswer = field(init=False, repr=False, compare=False)
    _data: ClassVar[tuple[str, ...]] = ("data",)

    def __post_init__(self) -> None:
        """Check the data, and make what is raised."""
        check_held_out(self.data, self.transform_like)
        check_type(
            "counts", self.counts, Mapping | None, "for each class of the forget set how many samples of it stay"
        )
        counts = self.counts and {
            check_count("class", label, least=0): check_count("counts", n, least=0) for label, n in self.counts.items()
        }
        objective = UnseenAnswer(reference=self.reference, teacher=as_teacher(self.teacher), outputs=self.outputs)
        store(self, counts=counts, objective=objective)

    @property
    @override
    def has_held_out(self) -> bool:
        return self.data is not None

    @override
    def prepare(self, around: Surroundings) -> Tensor:
        """Measure how sure of unseen samples the model is, and return how far it is to that, 0-d in nats."""
        objective = self.objective
        forget = ClassReader(objective.reference, objective.outputs)
        around.run(forget, around.forget)
        share = self._find_share(around, forget)
        held_out, stays = None, share[forget.labels] > 0
        if not forget.has_places:
            check_kind(int(stays.sum()), len(stays))
        if bool(stays.any()):
            reader = ClassReader(objective.reference, objective.outputs)
            around.run(reader, around.open_held_out(self.data))
            held_out = reader.log_odds, reader.labels
        objective.calibration.fit((forget.log_odds, forget.labels), held_out, share)
        objective.calibration.load_state_dict(around.agree(objective.calibration.state_dict()))
        return super().prepare(around)

    def _find_share(self, around: Surroundings, forget: ClassReader) -> Tensor:
        """Which share of each class is kept, float64 `[C]`."""
        forgotten = forget.count()
        if self.counts is not None:
            kept = torch.ones(forget.classes, dtype=torch.float64)
            for label, n in self.counts.items():
                number = check_count("class", label, least=0, most=forget.classes - 1)
                kept[number] = n / max(n + int(forgotten[number]), 1)
            return kept
        if forget.is_sequence:
            return torch.ones(forget.classes, dtype=torch.float64)
        retained = around.count_retained(forget)
        return retained.double() / (retained + forgotten).clamp(min=1)


@dataclass(frozen=True)
class SecondChoice(AnswerTarget):
    """The model's own second choice: the right target for samples whose label is wrong, or that were poisoned.

    There the label is what is wrong, and the model knows better. What is raised is
    `hamu_lightning.objectives.SecondAnswer` (docs/method.md#an-unseen-sample), in nats, from 0.

    Args:
        teacher: As for `Unseen`.
        reference: The model before unlearning; default: a frozen copy.
        outputs: How to ask the models about a batch.

    Raises:
        HAMUValueError: If an argument is of another kind.

    Example:
        >>> SecondChoice()
        SecondChoice()
    """

    teacher: Any = field(default=None, repr=False, kw_only=True)
    reference: Reference | None = field(default=None, repr=False, kw_only=True)
    outputs: Outputs | None = field(default=None, repr=False, kw_only=True)
    objective: SecondAnswer = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Make what is raised."""
        objective = SecondAnswer(reference=self.reference, teacher=as_teacher(self.teacher), outputs=self.outputs)
        store(self, objective=objective)

    @override
    def prepare(self, around: Surroundings) -> Tensor:
        """Check the labels, and return how far it is to the second choice, 0-d in nats."""
        around.run(ClassReader(None, self.objective.outputs), around.forget)
        return super().prepare(around)


def check_kind(staying: int, total: int) -> None:
    """Raise where a set holds samples of classes that stay, and whole classes: the nats of one would pay for the other.

    Raises:
        HAMUMisconfigurationError: Then.
    """
    if 0 < staying < total:
        raise HAMUMisconfigurationError(
            f"Expected whole classes to forget, or samples of classes that stay, but got {total - staying} samples of "
            f"the one and {staying} of the other kind: each has an end of its own. Make two groups of them: "
            "HAMUCallback({'classes': ..., 'samples': ...}, target={'classes': Unseen(), 'samples': Unseen(holdout)})."
        )


def as_teacher(teacher: Any) -> Reference | None:
    """The reference that a teacher means: a model goes in as it is.

    Raises:
        HAMUValueError: If it is none.
    """
    wanted = "a model that never saw what is to be forgotten, or a reference such as AdaptersDisabled()"
    check_type("teacher", teacher, nn.Module | Reference | None, wanted)
    return FrozenCopy(teacher) if isinstance(teacher, nn.Module) else teacher
