"""A small model that has never seen the data to forget, to say what to answer besides the label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hamu_lightning.checks import check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.loaders import load_like
from hamu_lightning.methods._protocol import DataSource
from hamu_lightning.methods._retrain import Retrain

# A few epochs are enough for the answers besides the label.
_EPOCHS = 5


def fit_teacher(
    module_factory: Callable[[], LightningModule],
    retain: Any,
    options: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 128,
) -> LightningModule:
    """Fit a teacher for `Unseen(teacher=...)`: a fresh model that sees the retain data alone, for a few epochs.

    The teacher says what to answer in the place of the label (docs/method.md#an-unseen-sample, eq. 13.1); how sure
    the answer is, it does not say. So it may be small, and be trained for less than the model was. Its outputs need the
    form and the classes of the model's.

    Args:
        module_factory: Makes a fresh module with its optimizer.
        retain: The data that stay: a DataLoader, a Dataset, a list of batches, or what has a `train_dataloader()`.
        options: Arguments of the Trainer. Default: 5 epochs, no logger, no checkpoints, no progress bar.
        seed: Of the weights and of the fit. Random numbers outside go on as if nothing had happened.
        batch_size: Where `retain` is a Dataset.

    Returns:
        The teacher, in evaluation mode, without gradients.

    Raises:
        HAMUValueError: If an argument is of another kind.

    Example:
        >>> import torch
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> batches = list(torch.randn(8, 32).split(4))
        >>> teacher = fit_teacher(BoringModel, batches, {"max_steps": 1, "accelerator": "cpu"})
        >>> teacher.training
        False
    """
    check_type("options", options, Mapping | None, "a dict of arguments of the Trainer")
    source = retain if isinstance(retain, DataSource) else _Loader(_as_loader(retain, batch_size))
    settings = {"max_epochs": _EPOCHS, "enable_progress_bar": False, **(options or {})}
    teacher = Retrain(module_factory, settings, seed)(None, source)
    return teacher.requires_grad_(False).eval()


class _Loader:
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def train_dataloader(self) -> Any:
        return self._loader


def _as_loader(retain: Any, batch_size: int) -> Any:
    if isinstance(retain, Dataset):
        return load_like(retain, None, batch_size=batch_size, shuffle=not isinstance(retain, IterableDataset))
    if isinstance(retain, list | tuple):  # which the Trainer would take for loaders
        return DataLoader(retain, batch_size=None)  # type: ignore[arg-type]
    if isinstance(retain, DataLoader):
        return retain
    raise HAMUValueError(
        f"Expected `retain` to be a DataLoader, a Dataset or a datamodule, but got {type(retain).__name__}. Give the "
        "training data without what is to be forgotten: split_forget(dataset, indices)[0]."
    )
