"""The loss of each sample, where the module's output shows it: checked against the module's own loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from hamu_lightning.callbacks.goals._reading import InOrder
from hamu_lightning.callbacks.passes import ForgetPass, unwrap_step, wrap_step
from hamu_lightning.objectives import AnswerObjective, BatchPass, ModuleLoss, ModuleOutputs, Objective, Outputs

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_IGNORED = -100
# The module's own loss of a batch and ours are the same number up to rounding.
_TOLERANCE = 1e-3
# The name of the form in which the values are an objective's, and not losses of the module's own.
OBJECTIVE = "objective"
# And of that in which each sample went through the module's own step in a batch of its own.
SINGLES = "one by one"
_SINGLES_TOLERANCE = 0.01


class SampleLosses(NamedTuple):
    """Of some samples.

    Attributes:
        losses: `[N]`, float64, on the CPU.
        recognised: `[N]`: 1 where the model gives the label, else 0, of a sequence the share; NaN where unknown.
    """

    losses: Tensor
    recognised: Tensor


class _Read(NamedTuple):
    losses: Tensor
    places: Tensor  # over how many places each loss is a mean
    recognised: Tensor | None


class SampleReader:
    """Reads the loss of each sample beside the fit.

    The module's output is read as `ModuleOutputs` does (or as the objective's `outputs`), and the usual losses are made
    of it: the one that gives the module's own loss of a batch is taken. Else the values are those of the objective (of
    one that raises an answer, which says nothing of held-out samples, the cross-entropy of its labels), or, of few
    samples, the module's own losses of batches of one.

    Args:
        trainer: The trainer.
        forget_pass: What runs batches without a trace.
        form: The form that was found in the run that this one continues.

    Attributes:
        form: Which loss it is; None where none was found.
    """

    def __init__(self, trainer: Trainer, forget_pass: ForgetPass, form: str | None = None) -> None:
        self._trainer, self._forget_pass = trainer, forget_pass
        self.form = form

    def read(self, data: InOrder, *step: Any) -> SampleLosses | None:
        """Read the samples of some data; None where their losses cannot be told.

        Args:
            data: The data.
            step: What runs a batch, and the arguments of the retain batch.
        """
        found = None if self.form == SINGLES else self._read_batches(data.batches, *step)
        if found is None and self.form in (None, SINGLES) and data.singles is not None:
            found = self._read_singles(data, *step)
        return found

    def _read_batches(
        self, batches: Iterable[Any], run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> SampleLosses | None:
        own, objective = unwrap_step(run)
        asking = _Asking(objective, self.form)
        asking_step = wrap_step(own, asking, self._trainer)

        def measure() -> list[_Read] | None:
            found = []
            for _ in self._forget_pass.losses(batches, asking_step, args, kwargs):
                if asking.read is None:
                    return None
                found.append(asking.read)
            return found

        found = self._forget_pass.measuring(measure, args[0])
        if not found:
            return None
        self.form = asking.form
        return SampleLosses(*(torch.cat(part).double().cpu() for part in zip(*map(_known, found), strict=True)))

    def _read_singles(
        self, data: InOrder, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> SampleLosses | None:
        """Each sample in a batch of its own, where their mean is the loss of the batches."""
        own, _ = unwrap_step(run)

        def read(batches: Any) -> tuple[Tensor, Tensor]:
            pairs = [*self._forget_pass.losses(batches, own, args, kwargs)]
            losses = torch.stack([torch.tensor(math.nan) if loss is None else loss.cpu() for loss, _ in pairs])
            return losses.double(), torch.tensor([size for _, size in pairs], dtype=torch.float64)

        try:
            (losses, _), (means, sizes) = self._forget_pass.measuring(
                lambda: (read(data.singles), read(data.batches)), args[0]
            )
        except Exception:  # some modules take no batch of one sample
            return None
        if not (losses.mean() - means @ sizes / sizes.sum()).abs() <= _SINGLES_TOLERANCE * losses.mean().abs():
            return None
        self.form = SINGLES
        return SampleLosses(losses, torch.full_like(losses, torch.nan))


class _Asking(Objective):
    """In the place of the module's step: keeps what is read of each batch in `read`, None where nothing can be."""

    def __init__(self, objective: Objective | None, form: str | None) -> None:
        self._objective, self.form = objective, form
        self._outputs = getattr(objective, "outputs", None) or ModuleOutputs()
        self.read: _Read | None = None

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        if self.form is None:
            self.form = self._find_form(batch)
        self.read = None if self.form is None else self._try(self.form, batch)
        return torch.zeros(1) if self.read is None else self.read.losses

    def _find_form(self, batch: BatchPass) -> str | None:
        try:
            own = float(batch.module_loss().detach().float().mean())
        except Exception:  # the data may be for the objective alone
            own = math.nan
        for form in (*_FORMS, OBJECTIVE):
            found = self._try(form, batch)
            if found is not None and (form == OBJECTIVE or _agrees(found, own)):
                return form
        return None

    def _try(self, form: str, batch: BatchPass) -> _Read | None:
        try:
            return self._read_as(form, batch)
        except Exception:  # what a module or an objective refuses with is its own choice
            return None

    def _read_as(self, form: str, batch: BatchPass) -> _Read | None:
        if form == OBJECTIVE:
            if self._objective is None or isinstance(self._objective, ModuleLoss):
                return None
            if isinstance(self._objective, AnswerObjective):
                return _of_labels(batch, self._objective.outputs)
            values = self._objective.samples(batch).detach().float()
            return _Read(values, torch.ones_like(values), None) if values.ndim == 1 and len(values) > 1 else None
        logits, labels = self._outputs(batch.module, batch.batch)
        return _FORMS[form](logits.detach().float(), labels)


def _agrees(found: _Read, own: float) -> bool:
    """Whether the module's own loss of the batch is the mean over samples, or over all places."""
    means = float(found.losses.mean()), float((found.losses * found.places).sum() / found.places.sum())
    return any(abs(mean - own) <= _TOLERANCE * max(abs(own), _TOLERANCE) for mean in means)


def _known(read: _Read) -> tuple[Tensor, Tensor]:
    recognised = torch.full_like(read.losses, torch.nan) if read.recognised is None else read.recognised
    return read.losses, recognised


def _of_labels(batch: BatchPass, outputs: Outputs) -> _Read:
    """The cross-entropy, whatever the module's own loss is."""
    prediction = batch.predict(outputs)
    is_right = (prediction.logits.argmax(dim=-1) == prediction.labels).float()
    losses, recognised = map(prediction.mean_over_places, (-prediction.log_likelihoods(), is_right))
    return _Read(losses.detach(), prediction.mask.sum(dim=1), recognised)


def _of_classes(logits: Tensor, labels: Tensor) -> _Read | None:
    """Logits `[N, C, ...]` with one class for each place `[N, ...]`."""
    if labels.is_floating_point() or logits.ndim < 2 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        return None
    losses = F.cross_entropy(logits, labels.long(), reduction="none", ignore_index=_IGNORED)
    return _over_places(losses, logits.argmax(dim=1) == labels, labels != _IGNORED)


def _of_tokens(logits: Tensor, labels: Tensor) -> _Read | None:
    """Logits `[N, T, V]` with labels `[N, T]`."""
    return None if logits.ndim < 3 else _of_classes(logits.movedim(-1, 1), labels)


def _of_shares(logits: Tensor, labels: Tensor) -> _Read | None:
    """Logits `[N, C]` with a share for each class."""
    if not labels.is_floating_point() or labels.shape != logits.shape or logits.ndim != 2:
        return None
    losses = F.cross_entropy(logits, labels.to(logits), reduction="none")
    return _Read(losses, torch.ones_like(losses), (logits.argmax(dim=1) == labels.argmax(dim=1)).float())


def _of_answers(logits: Tensor, labels: Tensor) -> _Read | None:
    """One logit for each yes-or-no label."""
    if labels.numel() != logits.numel() or labels.shape[:1] != logits.shape[:1]:
        return None
    labels = labels.reshape(logits.shape).to(logits)
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return _over_places(losses, (logits > 0) == (labels > 0.5), torch.ones_like(losses, dtype=torch.bool))


def _of_numbers(logits: Tensor, labels: Tensor) -> _Read | None:
    """The squared error."""
    if labels.numel() != logits.numel() or labels.shape[:1] != logits.shape[:1]:
        return None
    errors = (logits - labels.reshape(logits.shape).to(logits)).square().reshape(len(logits), -1)
    return _Read(errors.mean(dim=1), torch.full_like(errors[:, 0], errors.shape[1]), None)


def _over_places(losses: Tensor, is_right: Tensor, mask: Tensor) -> _Read:
    """The mean over the places of each sample."""
    losses, is_right, mask = (x.reshape(len(x), -1).float() for x in (losses, is_right, mask))
    places = mask.sum(dim=1)
    means = ((x * mask).sum(dim=1) / places.clamp(min=1) for x in (losses, is_right))
    losses, recognised = means
    return _Read(losses, places, recognised)


_FORMS: dict[str, Callable[[Tensor, Tensor], _Read | None]] = {
    "cross-entropy": _of_classes,
    "cross-entropy of tokens": _of_tokens,
    "cross-entropy of shares": _of_shares,
    "cross-entropy of answers": _of_answers,
    "squared error": _of_numbers,
}
