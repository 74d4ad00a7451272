"""A DataModule that is another one in all that it does not do itself."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule, Trainer

_HOOKS = (
    "prepare_data",
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


def find_base(source: object) -> type | None:
    """The LightningDataModule that an object is one of, of whichever package; None where it is none."""
    return next((base for base in type(source).__mro__ if base.__name__ == "LightningDataModule"), None)


class Forwarding(LightningDataModule):
    """Hands the hooks of another DataModule to the Trainer, and its attributes.

    Args:
        source: A DataModule; anything else has no hooks.
    """

    def __new__(cls, datamodule: Any = None, *_: Any, **__: Any) -> Any:
        """Make an object that the Trainer of the other one's package takes: `pytorch_lightning` has its own classes."""
        base = find_base(datamodule)
        if base is not None and not issubclass(cls, base):
            cls = type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__})
        return super().__new__(cls)

    def __init__(self, source: Any) -> None:
        self.datamodule = source
        super().__init__()
        if find_base(source) is None:
            return
        # All of them: the Trainer asks of the object whether a hook is another one than Lightning's own.
        for name in _HOOKS:
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
        if find_base(self.datamodule) is not None:
            self.datamodule.trainer = trainer

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the other one."""
        source = self.__dict__.get("datamodule")
        if find_base(source) is not None and not name.startswith("__"):
            return getattr(source, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
