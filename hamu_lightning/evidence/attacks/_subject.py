"""The model under attack, what it is attacked with, and what it says of each part of the data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.evidence import Evaluation, PartScores, evaluate
from hamu_lightning.loaders import in_order, load_like, transfer_by_hooks
from hamu_lightning.methods import SampleLosses
from hamu_lightning.metrics.functional import Estimate, membership_auc, undefined
from hamu_lightning.objectives import evaluating
from hamu_lightning.randomness import RandomStream

Part: TypeAlias = Dataset[Any] | DataLoader[Any] | Iterable[Any]
"""The samples `(x, y)` of one part of the data: a Dataset, a DataLoader over one, or other batches."""


class Unfit(Exception):
    """An attack says nothing here; the message is the reason."""


@dataclass(frozen=True)
class Plan:
    """What is the same for the model and its control; see `attack`."""

    parts: Mapping[str, Part]
    losses: SampleLosses | None
    layer: str | None
    steps: int
    lr: float
    batch_size: int
    share: float
    group: int
    samples: int
    seed: int

    @property
    def held_out(self) -> str | None:
        """The part of samples that were never trained on; None where there is none."""
        return next((name for name in ("holdout", "test") if name in self.parts), None)

    def part(self, name: str) -> Part:
        """A part as it was given."""
        if name not in self.parts:
            raise Unfit(f"no {name} data was given")
        return self.parts[name]

    def batches(self, name: str) -> Iterable[Any]:
        """Each sample of a part once, in order."""
        batches: Iterable[Any] = in_order(self.part(name))
        return batches

    def dataset(self, name: str) -> Dataset[Any]:
        """The samples of a part, which can be drawn from."""
        part = self.part(name)
        data = part.dataset if isinstance(part, DataLoader) else part
        if not isinstance(data, Dataset) or isinstance(data, IterableDataset):
            raise Unfit(f"the {name} data are no Dataset with positions")
        return data

    def loader(self, dataset: Any, like: str) -> DataLoader[Any]:
        """A loader of other samples, otherwise as that of a part."""
        return load_like(dataset, self.parts.get(like), batch_size=self.batch_size)


class Subject:
    """A copy of a model, in evaluation mode, and what it says; nothing is read twice.

    Args:
        module: The model. It is left as it is.
        plan: What it is attacked with.
    """

    def __init__(self, module: LightningModule, plan: Plan) -> None:
        self.module, self.plan = copy.deepcopy(module).eval(), plan
        self._read: dict[str, PartScores] = {}

    def scores(self, name: str) -> PartScores:
        """What the model says of a part.

        Raises:
            Unfit: If there is no such part, or nothing can be read.
        """
        if name not in self._read:
            self._read[name] = self.read(self.module, name)
        return self._read[name]

    @cached_property
    def evaluation(self) -> Evaluation:
        """What the model says of all parts that were given."""
        return Evaluation({name: self.scores(name) for name in self.plan.parts})

    @property
    def gone(self) -> list[int]:
        """The classes that are forgotten as a whole.

        Raises:
            Unfit: If there is none.
        """
        classes: list[int] = self.evaluation.gone.tolist()
        if not classes:
            raise Unfit("no class is forgotten as a whole")
        return classes

    def read(self, module: LightningModule, name: str) -> PartScores:
        """What another module says of a part."""
        return read(module, self.plan.part(name), self.plan.losses)

    def read_samples(self, module: LightningModule, samples: Dataset[Any], like: str) -> PartScores:
        """What another module says of some samples of a part."""
        return read(module, self.plan.loader(samples, like), self.plan.losses)

    def membership(self, module: LightningModule, forget: PartScores) -> Estimate:
        """AUC of the membership attack by loss under another module, against comparable held-out samples."""
        name = self.plan.held_out
        if name is None:
            return undefined("no held-out data was given", (len(forget), 0), 0.5)
        others = Evaluation({"forget": forget, name: self.read(module, name)}).comparable()
        if others is None:
            return undefined("no held-out sample is of the forgotten classes", (len(forget), 0), 0.5)
        return membership_auc(forget.losses, others.losses)


def read(module: LightningModule, part: Part, losses: SampleLosses | None = None) -> PartScores:
    """What a module says of some samples, in evaluation mode, with random numbers of its own.

    Raises:
        Unfit: If it is no classifier, and no other losses were given.
    """
    if losses is not None:
        return _read_losses(module, in_order(part), losses)
    reason = "it is no classifier of `x` into logits [N, K] with a label each"
    try:
        scores = evaluate(module, {"forget": part}).parts["forget"]
    except HAMUValueError as error:
        raise Unfit(reason) from error
    if scores.log_probs is None:
        raise Unfit(reason)
    return scores


def run(module: LightningModule, batches: Iterable[Any]) -> Iterator[Tensor]:
    """Run a module over batches `(x, y)` in evaluation mode; yield the labels after each."""
    for x, y in _on_device(module, batches):
        with _at_rest(module):
            module(x)
        yield y


def _on_device(module: LightningModule, batches: Iterable[Any]) -> Iterator[Any]:
    return (transfer_by_hooks(module, batch, module.device) for batch in batches)


@contextmanager
def _at_rest(module: LightningModule) -> Iterator[None]:
    with evaluating(module), RandomStream(0).active(), torch.no_grad():
        yield


def _read_losses(module: LightningModule, batches: Iterable[Any], losses: SampleLosses) -> PartScores:
    with _at_rest(module):
        found = [losses(module, batch).double().cpu() for batch in _on_device(module, batches)]
    if not found:
        raise Unfit("a part of the data has no sample")
    values = torch.cat(found)
    return PartScores(values, torch.full_like(values, torch.nan), torch.arange(len(values)))
