"""Measuring what a model says of all parts of the data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hamu_lightning.callbacks.goals import FORMS, SampleRead, explain_difference, find_form
from hamu_lightning.callbacks.passes import Look
from hamu_lightning.checks import check_choice, check_count, check_optional, check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.evidence._ordered import Ordered, check_part
from hamu_lightning.evidence._scores import FORGET, HOLDOUT, PARTS, TEST, Evaluation, PartScores
from hamu_lightning.gramian import widest_float
from hamu_lightning.objectives import ModuleOutputs, Outputs

# The form in which each sample goes through the module's own step in a batch of its own; its mean is then the loss of
# the batch, up to so much of it.
_SINGLES, _SINGLES_TOLERANCE = "one by one", 0.01
# What is read where the module's own loss is not known: forms that follow from labels.
_BY_LABELS = ("cross-entropy", "cross-entropy of tokens", "cross-entropy of shares", "cross-entropy of answers")
# So many logits are widened at once: 128 MiB.
_WIDE = 2**24
_CURE = (
    "Give both the same transforms, such as views of one Dataset without augmentation: else an attack by loss finds "
    "the transforms."
)
_UNKNOWN = (
    "The losses of single samples are cross-entropies of the labels: the module's own loss is another one, or not "
    "known. Where that matters, let `training_step` return the mean of a loss of single samples."
)


def evaluate(
    module: LightningModule,
    parts: Mapping[str, Dataset[Any] | Iterable[Any]],
    *,
    outputs: Outputs | None = None,
    max_batches: int | None = None,
    datamodule: LightningDataModule | None = None,
) -> Evaluation:
    """Measure what a module says of the samples of each part, in evaluation mode and without a trace.

    No Trainer is needed; one that is attached, in a fit too, sees nothing of it: random numbers, weights, buffers,
    metrics, modes, gradients and what is logged stay as they are. The loss of each sample is the module's own: of the
    usual losses (cross-entropy of classes, places, tokens, shares and yes or no, squared error) the one that gives what
    `training_step` returns for a batch; else what it returns for each sample in a batch of its own, where the mean of
    these is that of the batch; else, with a warning, the cross-entropy of the labels. Losses are computed in float64
    from the logits. Samples without a label (-100) are left out.

    Args:
        module: The module.
        parts: For "forget" and any of "retain", "holdout" and "test" a Dataset (loaded like the first DataLoader among
            them), a DataLoader (without its shuffle and its `drop_last`), or another iterable of batches. A sample's id
            is its position in its Dataset, as in `ForgottenSamples`; else its number among those that were read.
        outputs: How to ask the module about a batch; see `hamu_lightning.objectives.Outputs`.
        max_batches: So many batches of each part at most, spread over a Dataset. None for all.
        datamodule: Whose transfer hooks the batches take. Default: that of the attached Trainer.

    Returns:
        The scores; of a classifier with one class per sample with log-probabilities and labels.

    Raises:
        HAMUValueError: If a part is empty, of another kind, or its losses cannot be told.
        HAMUStateError: If the module asks for a Trainer, and has none.

    Example:
        >>> class Classifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(2, 3)
        ...     def forward(self, x):
        ...         return self.net(x)
        ...     def training_step(self, batch):
        ...         return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        >>> data = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> found = evaluate(Classifier(), {"retain": data, "forget": torch.utils.data.Subset(data, [1, 2])})
        >>> len(found.parts["retain"]), found.parts["forget"].labels.tolist()
        (4, [1, 2])
    """
    return Evaluator(module, parts, outputs=outputs, datamodule=datamodule).measure(max_batches)


class Evaluator:
    """Measures one module again and again; see `evaluate`.

    Args:
        module: The module.
        parts: The data.
        outputs: How to ask the module about a batch.
        datamodule: Whose transfer hooks the batches take.
    """

    def __init__(
        self,
        module: LightningModule,
        parts: Mapping[str, Any],
        *,
        outputs: Outputs | None = None,
        datamodule: LightningDataModule | None = None,
    ) -> None:
        check_type("module", module, torch.nn.Module, "a LightningModule")
        check_type("parts", parts, Mapping, "a dict from 'retain', 'forget', 'holdout' and 'test' to data")
        for name, source in parts.items():
            check_choice("a name in `parts`", name, PARTS)
            check_part(name, source)
        if FORGET not in parts:
            raise HAMUValueError("Expected the data to forget among `parts`, but got none. Give it as 'forget'.")
        self._parts = {name: parts[name] for name in PARTS if name in parts}
        self._like = next((source for source in self._parts.values() if isinstance(source, DataLoader)), None)
        self._look = Look(module, datamodule)
        self._samples = _Samples(self._look, module, outputs)
        self._warn_about_transforms()

    def measure(self, max_batches: int | None = None) -> Evaluation:
        """Measure the module as it is now."""
        check_optional(check_count, "max_batches", max_batches)
        ordered = {name: Ordered(source, self._like, max_batches) for name, source in self._parts.items()}
        with self._look.open():
            parts = {name: self._samples.read(name, data) for name, data in ordered.items()}
        return Evaluation(parts, is_whole=all(data.is_whole for data in ordered.values()))

    def holds(self, before: Evaluation) -> bool:
        """Whether an earlier evaluation is one of the same samples, as far as their ids tell it."""
        ids = {name: Ordered(source, self._like, None).ids for name, source in self._parts.items()}
        return {*ids} == {*before.parts} and all(
            mine is None or bool(torch.isin(before.parts[name].ids, mine).all()) for name, mine in ids.items()
        )

    def _warn_about_transforms(self) -> None:
        name = next((name for name in (HOLDOUT, TEST) if name in self._parts), None)
        doubt = name and explain_difference(self._parts[FORGET], self._parts[name], f"{name} data", _CURE)
        if doubt:
            warnings.warn(doubt, stacklevel=4)


class _Answer(NamedTuple):
    """What the module's output shows of a batch."""

    losses: Tensor
    recognised: Tensor
    log_probs: Tensor | None
    labels: Tensor | None
    is_there: Tensor  # whether a sample has something to predict


class _Samples:
    """Reads samples.

    Args:
        look: Runs batches.
        module: The module.
        outputs: How to ask it.
    """

    def __init__(self, look: Look, module: LightningModule, outputs: Outputs | None) -> None:
        self._look, self._module, self._outputs = look, module, outputs or ModuleOutputs()
        self._form: str | None = None  # that of the losses
        self._labels_form: str | None = None  # that of what is recognised, where losses are read one by one

    def read(self, name: str, data: Ordered) -> PartScores:
        """Read one part."""
        answers = []
        for number, batch in enumerate(data):
            batch = self._look.transfer(batch)
            if self._form is None:
                self._choose_form(batch, data)
            answers.append(self._answer(batch, number))
        if not answers:
            raise HAMUValueError(f"Expected the data of {name!r} to hold at least one sample, but it is empty.")
        columns: Any = (None if column[0] is None else torch.cat(column) for column in zip(*answers, strict=True))
        losses, recognised, log_probs, labels, is_there = columns
        if self._form == _SINGLES:
            losses = self._read_singles(data.singles())
        ids = torch.arange(len(losses)) if data.ids is None or len(data.ids) != len(losses) else data.ids
        scores = PartScores(losses, recognised, ids, log_probs, labels)
        return scores if bool(is_there.all()) else scores.select(is_there)

    def _answer(self, batch: Any, number: int) -> _Answer:
        form = self._labels_form if self._form == _SINGLES else self._form
        if form is None:
            unknown = torch.full((len(_first_tensor(batch)),), math.nan, dtype=torch.float64)
            return _Answer(unknown, unknown, None, None, torch.ones_like(unknown, dtype=torch.bool))
        logits, labels = self._outputs(self._module, batch)
        read = _read(form, logits, labels)
        if read is None:
            raise HAMUValueError(
                f"Expected all batches to be of the form of the first one, {form}, but number {number} is not. "
                "Give parts of one kind."
            )
        recognised = torch.full_like(read.losses, math.nan) if read.recognised is None else read.recognised
        is_classifier = form == _BY_LABELS[0] and logits.ndim == 2
        log_probs = logits.detach().to("cpu", torch.float64).log_softmax(dim=1) if is_classifier else None
        losses, recognised = (x.to("cpu", torch.float64) for x in (read.losses, recognised))
        return _Answer(
            losses, recognised, log_probs, labels.long().cpu() if is_classifier else None, (read.places > 0).cpu()
        )

    def _choose_form(self, batch: Any, data: Ordered) -> None:
        """Find out which loss is the module's own, on a first batch.

        Raises:
            HAMUValueError: If none can be told.
        """
        own, fault = self._own_loss(batch)
        by_labels = None
        try:
            logits, labels = self._outputs(self._module, batch)
            self._form = find_form(_wide(logits), labels, own)
            by_labels = next((form for form in _BY_LABELS if _read_or_none(form, logits, labels) is not None), None)
        except Exception as error:  # what a module refuses with is its own choice
            fault = error
        if self._form is None and self._are_singles_the_same(own, batch, data):
            self._form, self._labels_form = _SINGLES, by_labels
        if self._form is None:
            if by_labels is None:
                if isinstance(fault, RuntimeError) and "attached to a `Trainer`" in str(fault):
                    raise fault
                raise HAMUValueError(
                    "Expected to find the loss of each sample, but the module's output shows none, and its own loss "
                    "of a batch is not the mean of its losses of single samples. Pass `outputs=`, a function of the "
                    "module and the batch that returns logits and labels."
                ) from fault
            self._form = by_labels
            if self._look.has_step:
                warnings.warn(_UNKNOWN, stacklevel=2)

    def _own_loss(self, batch: Any) -> tuple[float, Exception | None]:
        if not self._look.has_step:
            return math.nan, None
        try:
            return self._look.loss(batch), None
        except Exception as error:
            return math.nan, error

    def _are_singles_the_same(self, own: float, batch: Any, data: Ordered) -> bool:
        if not math.isfinite(own):
            return False
        singles = data.singles(len(_first_tensor(batch)))
        try:
            losses = None if singles is None else self._read_singles(singles)
        except Exception:  # some modules take no batch of one sample
            return False
        return losses is not None and abs(float(losses.mean()) - own) <= _SINGLES_TOLERANCE * abs(own)

    def _read_singles(self, singles: Iterable[Any] | None) -> Tensor:
        assert singles is not None
        return torch.tensor([self._look.loss(self._look.transfer(one)) for one in singles], dtype=torch.float64)


def _wide(logits: Tensor) -> Tensor:
    return logits.detach().to(widest_float(logits.device))


def _read(form: str, logits: Tensor, labels: Tensor) -> SampleRead | None:
    """Read logits `[N, ...]`, a part of them at a time: in float64 those of a language model are large."""
    size = max(1, _WIDE * len(logits) // max(logits.numel(), 1))
    reads = [
        FORMS[form](_wide(x), y) for x, y in zip(torch.split(logits, size), torch.split(labels, size), strict=True)
    ]
    found = [read for read in reads if read is not None]
    if len(found) < len(reads):
        return None
    columns = zip(*found, strict=True)
    return SampleRead(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def _read_or_none(form: str, logits: Tensor, labels: Tensor) -> SampleRead | None:
    try:
        return _read(form, logits, labels)
    except Exception:  # labels that are no classes
        return None


def _first_tensor(batch: Any) -> Tensor:
    """The tensor whose length is the number of samples."""
    return next(leaf for leaf in torch.utils._pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim)
