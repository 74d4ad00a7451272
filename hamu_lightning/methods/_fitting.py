"""A fit by a plain Trainer that leaves nothing behind but the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from hamu_lightning.loaders import own_generators
from hamu_lightning.methods._data import with_train_loader
from hamu_lightning.methods._protocol import DataSource
from hamu_lightning.randomness import RandomStream

# Only the weights at the end are wanted.
_QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}


def fit(
    module: LightningModule,
    datamodule: DataSource,
    options: Mapping[str, Any],
    seed: int,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Fit a module in place. All random numbers come from the seed; outside they go on as if nothing had happened.

    A LightningDataModule is used with its hooks; of other sources the training loader alone.

    Args:
        module: The module.
        datamodule: Gives the training loader.
        options: Arguments of the Trainer. Default: no logger, no checkpoints, no summary.
        seed: Also of the loader's own generators.
        callbacks: Besides those in `options`, of which copies are used: a callback serves one fit.
    """
    stream = RandomStream(seed)
    loader = datamodule.train_dataloader()
    stream.generators = own_generators(loader)
    given = copy.deepcopy(options.get("callbacks")) or []
    given = [given] if isinstance(given, Callback) else given
    with stream.active():
        trainer = Trainer(**{**_QUIET, **options, "callbacks": [*given, *callbacks]})
        if isinstance(datamodule, LightningDataModule):
            trainer.fit(module, datamodule=with_train_loader(datamodule, loader))
        else:
            trainer.fit(module, loader)
    module.trainer = None
