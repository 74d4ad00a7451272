"""What a trainer knows of the parts of the data in a fit."""

from __future__ import annotations

from collections.abc import Mapping
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


def find_parts(trainer: Trainer) -> dict[str, Any]:
    """The data of a fit that has started, as far as they are known.

    Returns:
        "retain", the training data; with a `HAMUCallback` "forget", the data to forget of all requests, if their
        loaders can be joined, and "holdout", the held-out data of a target; without these "holdout" is what the
        datamodule's `holdout_dataloader()` gives, or the validation loader, where there is one.
    """
    train = _compat_loaders.train_loader_parts(trainer)
    retain = train.get("retain") if isinstance(train, Mapping) else train
    hamu = find_hamu(trainer)
    forget, of_target = (None, None) if hamu is None else hamu.find_data()
    held_out = (of_target, _compat_loaders.held_out_loader(trainer), _validation_loader(trainer))
    parts = {
        "retain": retain if isinstance(retain, DataLoader) else _compat_loaders.train_batches(trainer),
        "forget": _join(forget or {}),
        "holdout": next((x for x in held_out if x is not None), None),
    }
    return {name: part for name, part in parts.items() if part is not None}


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
