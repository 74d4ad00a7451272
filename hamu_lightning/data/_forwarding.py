"""A DataModule that is another one in all that it does not do itself."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

_HOOKS = (
    "prepare_data",
    "setup",
    "teardown",
    "on_exception",
    "state_dict",
    "load_state_dict",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "transfer_batch_to_device",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
)
_SETTINGS = (
    "prepare_data_per_node",
    "allow_zero_length_dataloader_with_multiple_devices",
    "_log_hyperparams",
    "_hparams",
    "_hparams_initial",
    "_hparams_name",
)


class Forwarding(LightningDataModule):
    """Hands the hooks of another DataModule to the Trainer, those that it has and no others, and its attributes.

    Args:
        source: A DataModule; anything else has no hooks.
    """

    def __init__(self, source: Any) -> None:
        self.datamodule = source
        super().__init__()
        if not isinstance(source, LightningDataModule):
            return
        # The Trainer asks of the object whether a hook is another one than Lightning's own, which does nothing.
        for name in _HOOKS:
            if is_overridden(name, source):
                setattr(self, name, getattr(source, name))
        for name in _SETTINGS:
            if name in vars(source):
                setattr(self, name, vars(source)[name])

    @property
    def trainer(self) -> Trainer | None:
        """The Trainer, which the other one is told too."""
        return self.__dict__.get("_trainer")

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self.__dict__["_trainer"] = trainer
        if isinstance(self.datamodule, LightningDataModule):
            self.datamodule.trainer = trainer

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the other one."""
        source = self.__dict__.get("datamodule")
        if isinstance(source, LightningDataModule) and not name.startswith("__"):
            return getattr(source, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
