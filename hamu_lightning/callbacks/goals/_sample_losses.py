"""The loss of each sample, where the module's output shows it: checked against the module's own loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from hamu_lightning.callbacks.goals._loss_forms import FORMS, SampleRead, agrees
from hamu_lightning.callbacks.goals._reading import InOrder
from hamu_lightning.callbacks.passes import ForgetPass, unwrap_step, wrap_step
from hamu_lightning.objectives import AnswerObjective, BatchPass, ModuleLoss, ModuleOutputs, Objective, Outputs

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

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
        classes: `[N]`, the class of each; NaN where it has not one alone. None where nobody asked.
    """

    losses: Tensor
    recognised: Tensor
    classes: Tensor | None = None

    def of_classes(self, like: SampleLosses) -> Tensor:
        """The losses of the samples whose classes are among those of others; all where classes are unknown."""
        if self.classes is None or like.classes is None or self.classes.isnan().any() or like.classes.isnan().any():
            return self.losses
        return self.losses[torch.isin(self.classes, like.classes)]


class SampleReader:
    """Reads the loss of each sample beside the fit.

    The module's output is read as `ModuleOutputs` does (or as the objective's `outputs`), and the usual losses are made
    of it: the one that gives the module's own loss of a batch is taken. Else, where an objective is what is judged, the
    values are its own (of one that raises an answer, which says nothing of held-out samples, the cross-entropy of its
    labels), or, of few samples, the module's own losses of batches of one.

    Args:
        trainer: The trainer.
        forget_pass: What runs batches without a trace.
        form: The form that was found in the run that this one continues.
        by_objective: Whether what is raised is what is judged.

    Attributes:
        form: Which loss it is; None where none was found.
    """

    def __init__(
        self, trainer: Trainer, forget_pass: ForgetPass, form: str | None = None, *, by_objective: bool = True
    ) -> None:
        self._trainer, self._forget_pass, self._by_objective = trainer, forget_pass, by_objective
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
        asking = _Asking(objective, self.form, by_objective=self._by_objective)
        asking_step = wrap_step(own, asking, self._trainer)

        def measure() -> list[SampleRead] | None:
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

    def __init__(self, objective: Objective | None, form: str | None, *, by_objective: bool = True) -> None:
        self._objective, self.form, self._by_objective = objective, form, by_objective
        self._outputs = getattr(objective, "outputs", None) or ModuleOutputs()
        self.read: SampleRead | None = None

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
        for form in (*FORMS, OBJECTIVE):
            found = self._try(form, batch)
            if found is not None and (form == OBJECTIVE or agrees(found, own)):
                return form
        return None

    def _try(self, form: str, batch: BatchPass) -> SampleRead | None:
        try:
            return self._read_as(form, batch)
        except Exception:  # what a module or an objective refuses with is its own choice
            return None

    def _read_as(self, form: str, batch: BatchPass) -> SampleRead | None:
        if form == OBJECTIVE:
            if not self._by_objective or self._objective is None or isinstance(self._objective, ModuleLoss):
                return None
            if isinstance(self._objective, AnswerObjective):
                return _of_labels(batch, self._objective.outputs)
            values = self._objective.samples(batch).detach().float()
            return SampleRead(values, torch.ones_like(values), None) if values.ndim == 1 and len(values) > 1 else None
        logits, labels = self._outputs(batch.module, batch.batch)
        return FORMS[form](logits.detach().float(), labels)


def _known(read: SampleRead) -> list[Tensor]:
    parts = (read.losses, read.recognised, read.classes)
    return [torch.full_like(read.losses, torch.nan) if part is None else part for part in parts]


def _of_labels(batch: BatchPass, outputs: Outputs) -> SampleRead:
    """The cross-entropy, whatever the module's own loss is."""
    prediction = batch.predict(outputs)
    is_right = (prediction.logits.argmax(dim=-1) == prediction.labels).float()
    losses, recognised = map(prediction.mean_over_places, (-prediction.log_likelihoods(), is_right))
    is_one = prediction.labels.shape[1] == 1 and not prediction.is_sequence
    classes = prediction.labels[:, 0] if is_one else None
    return SampleRead(losses.detach(), prediction.count_places(), recognised, classes)
