"""Where forgotten data may still sit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from hamu_lightning.callbacks import HAMUCallback
from hamu_lightning.checks import check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.evidence import Finding
from hamu_lightning.evidence.residue._files import judge_folder
from hamu_lightning.evidence.residue._live import judge_callback, judge_module, judge_optimizer, judge_trainer


def audit(
    module: LightningModule | None = None,
    trainer: Trainer | None = None,
    folder: str | Path | None = None,
    callback: HAMUCallback | None = None,
    optimizer: Optimizer | None = None,
) -> list[Finding]:
    """Look for places where something of the forgotten data may be left, besides the weights themselves.

    Nothing is changed, and nothing in a file is run: checkpoints are read with `weights_only=True`, pickles not at all.
    What cannot be read is "unknown". Places that nobody can see from here (backups, copies, other machines, deleted
    files on a disk, the data set itself) are not in the list.

    Args:
        module: The unlearned module: statistics of norms, averaged weights, data among hyper-parameters and attributes.
        trainer: Its trainer: optimizers, callbacks that average weights. What else is here is taken from it where it is
            not given: module, callback, and the folder of its ModelCheckpoint.
        folder: A folder with checkpoints, logs and caches; all below it is looked at. "The" unlearned model is the
            checkpoint with the most unlearning steps.
        callback: The HAMUCallback.
        optimizer: An optimizer: its moments.

    Returns:
        The findings: where, whether ("yes", "no", "unknown"), and what to do.

    Raises:
        HAMUValueError: If an argument is of another kind, there is no such folder, or nothing was given.

    Example:
        >>> from torch.optim import SGD
        >>> import torch
        >>> print(*audit(optimizer=SGD([torch.ones(2)], lr=0.1)))
        Finding(place='optimizer: moments', holds='no', advice='It has none.')
    """
    check_type("module", module, LightningModule | None, "a LightningModule")
    check_type("trainer", trainer, Trainer | None, "a Trainer")
    check_type("callback", callback, HAMUCallback | None, "a HAMUCallback")
    check_type("optimizer", optimizer, Optimizer | None, "an Optimizer")
    if all(given is None for given in (module, trainer, folder, callback, optimizer)):
        raise HAMUValueError("Expected something to look at, but got nothing. Give `folder`, or `trainer`.")
    if trainer is not None:
        module = trainer.lightning_module if module is None else module
        found = [c for c in trainer.callbacks if isinstance(c, HAMUCallback)]  # type: ignore[attr-defined]
        callback = found[0] if callback is None and found else callback
        folder = _folder_of(trainer) if folder is None else folder
    return list(_look(module, trainer, None if folder is None else open_folder(folder), callback, optimizer))


def open_folder(folder: str | Path) -> Path:
    """Return a folder that is there.

    Raises:
        HAMUValueError: If there is none.
    """
    path = Path(folder)
    if not path.is_dir():
        raise HAMUValueError(f"Expected `folder` to be a folder, but there is none at {str(path)!r}. Check the path.")
    return path


def _look(
    module: LightningModule | None,
    trainer: Trainer | None,
    folder: Path | None,
    callback: HAMUCallback | None,
    optimizer: Optimizer | None,
) -> Iterator[Finding]:
    if module is not None:
        yield from judge_module(module)
    if optimizer is not None:
        yield judge_optimizer(optimizer)
    if trainer is not None:
        yield from judge_trainer(trainer)
    if callback is not None:
        yield from judge_callback(callback)
    if folder is not None:
        yield from judge_folder(folder)


def _folder_of(trainer: Trainer) -> str | None:
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return folder if folder and Path(folder).is_dir() else None
