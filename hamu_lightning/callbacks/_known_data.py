"""What a trainer knows of the parts of the data in a fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch.utils.data import ConcatDataset, DataLoader, IterableDataset

from hamu_lightning.callbacks import _compat_loaders
from hamu_lightning.callbacks._hamu_callback import HAMUCallback
from hamu_lightning.loaders import load_like

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def find_hamu(trainer: Trainer) -> HAMUCallback | None:
    """The HAMUCallback of a trainer, if it has one."""
    return next((c for c in trainer.callbacks if isinstance(c, HAMUCallback)), None)  # type: ignore[attr-defined]


def find_parts(trainer: Trainer, known: Collection[str] = ()) -> dict[str, Any]:
    """The data of a fit that has started, as far as they are known.

    Args:
        trainer: The trainer.
        known: The names of parts that need not be looked for: others may have to make their loaders.

    Returns:
        "retain", the training data; with a `HAMUCallback` "forget", the data to forget of all requests, if their
        loaders can be joined, and "holdout", the held-out data of a target; without these "holdout" is what the
        datamodule's `holdout_dataloader()` gives, or the validation loader, where there is one.
    """
    finders = {"retain": _find_retain, "forget": _find_forget, "holdout": _find_held_out}
    parts = {name: find(trainer) for name, find in finders.items() if name not in known}
    return {name: part for name, part in parts.items() if part is not None}


def _find_retain(trainer: Trainer) -> Any:
    train = _compat_loaders.train_loader_parts(trainer)
    retain = train.get("retain") if isinstance(train, Mapping) else train
    return retain if isinstance(retain, DataLoader) else _compat_loaders.train_batches(trainer)


def _find_forget(trainer: Trainer) -> Any:
    hamu = find_hamu(trainer)
    return None if hamu is None else _join(hamu.find_data()[0])


def _find_held_out(trainer: Trainer) -> Any:
    hamu = find_hamu(trainer)
    of_target = None if hamu is None else hamu.find_data()[1]
    of_data = _compat_loaders.held_out_loader(trainer) if of_target is None else of_target
    return _validation_loader(trainer) if of_data is None else of_data


def _validation_loader(trainer: Trainer) -> Any:
    loaders = trainer.val_dataloaders
    if isinstance(loaders, list | tuple) and len(loaders) == 1:
        return loaders[0]
    return None if isinstance(loaders, list | tuple | Mapping) else loaders


def _join(loaders: Mapping[str, Any]) -> Any:
    """One loader of the samples of several; None where there is none, or they cannot be joined."""
    found = [*loaders.values()]
    if len(found) < 2:
        return found[0] if found else None
    if not all(isinstance(x, DataLoader) and not isinstance(x.dataset, IterableDataset) for x in found):
        return None
    return load_like(ConcatDataset([x.dataset for x in found]), found[0], batch_size=found[0].batch_size)
