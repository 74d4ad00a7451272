"""What every unlearning method is: a function of a trained module, its data, and the data to forget."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from lightning.pytorch import LightningModule
from torch.utils.data import Dataset

Forget: TypeAlias = Dataset[Any] | Iterable[Any]
"""A Dataset, or a loader that yields batches."""


@runtime_checkable
class DataSource(Protocol):
    """What gives the data: a LightningDataModule that has been set up, or any object with this method."""

    def train_dataloader(self) -> Any:
        """Return the loader of the retain data."""


@runtime_checkable
class Method(Protocol):
    """An unlearning method with all its settings.

    Frozen dataclasses whose fields are the settings are methods. One with a field `seed` draws its random numbers from
    it alone, so that `compare` can give all methods the same one.
    """

    def __call__(self, module: LightningModule, datamodule: DataSource, forget: Forget) -> LightningModule:
        """Return a module that has forgotten. The one given is not changed.

        Args:
            module: The trained module.
            datamodule: Its `train_dataloader()` is the retain stream.
            forget: The data to forget: a Dataset, or a loader.
        """
