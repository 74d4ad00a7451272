"""The reference: a model that has never seen the data to forget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from hamu_lightning.checks import check_seed, check_type, store
from hamu_lightning.loaders import in_order
from hamu_lightning.methods._fingerprint import fingerprint, hash_batches, hash_tensors
from hamu_lightning.methods._fitting import fit
from hamu_lightning.methods._protocol import DataSource, Forget
from hamu_lightning.methods._storage import load_weights, save_weights
from hamu_lightning.randomness import RandomStream

# Files of another format are not looked at.
_FORMAT = "weights with a seal"


@dataclass(frozen=True)
class Retrain:
    """Trains a fresh module on the retain data: what exact unlearning gives, and what the others are measured by.

    With `cache`, weights that were trained before are read from there. The file's name is a hash of the content of all
    retain samples, the batch size, `drop_last`, the fresh module's weights, hyper-parameters and plain attributes, the
    code of the factory, the options, the seed, and the versions of torch and Lightning. Code that is merely called is
    not seen: empty the folder after a change to `training_step`, say.

    Args:
        module_factory: Makes a fresh module.
        options: Arguments of the Trainer, such as `{"max_epochs": 12}`. Its progress bar is on.
        seed: Seed of the initial weights and of the fit.
        cache: A folder for the weights; None keeps none.

    Raises:
        HAMUValueError: If an argument is of another kind.
        HAMUStateError: If a file of the cache is broken, or holds other weights than were written there.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> Retrain(BoringModel, {"max_epochs": 12}).seed
        0
    """

    module_factory: Callable[[], LightningModule]
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    cache: Path | str | None = None

    def __post_init__(self) -> None:
        check_type("module_factory", self.module_factory, Callable, "a function that makes a fresh LightningModule")
        check_type("options", self.options, Mapping, "a dict of arguments of the Trainer")
        check_type("cache", self.cache, str | Path | None, "a folder, or None")
        store(self, seed=check_seed(self.seed))

    def __call__(
        self, module: LightningModule | None, datamodule: DataSource, forget: Forget | None = None
    ) -> LightningModule:
        """Return a fresh module trained on the retain data. The module and the data to forget are not looked at."""
        fresh = self._build()
        path = self._find_path(fresh, datamodule)
        if _restore(fresh, path):
            return fresh
        fit(fresh, datamodule, self.options, self.seed)
        if path:
            save_weights(path, fresh.state_dict())
        return fresh

    def load(self, datamodule: DataSource) -> LightningModule | None:
        """Return the module with the weights from the cache; None where they are not there."""
        fresh = self._build()
        return fresh if _restore(fresh, self._find_path(fresh, datamodule)) else None

    def _build(self) -> LightningModule:
        with RandomStream(self.seed).active():
            return self.module_factory()

    def _find_path(self, fresh: LightningModule, datamodule: DataSource) -> Path | None:
        if self.cache is None:
            return None
        loader = datamodule.train_dataloader()
        # Batches are hashed one by one: their size counts as well.
        data = (hash_batches(in_order(loader)), getattr(loader, "drop_last", None))
        plain = {k: v for k, v in vars(fresh).items() if isinstance(v, bool | int | float | str)}
        weights = hash_tensors(list(fresh.state_dict().items()))
        settings = (dict(fresh.hparams), plain, self.module_factory, dict(self.options), self.seed, _FORMAT)
        return Path(self.cache) / f"{fingerprint(data, weights, *settings)}.pt"


def _restore(module: LightningModule, path: Path | None) -> bool:
    """Give a module the weights of a file, and return whether there are any."""
    weights = load_weights(path) if path else None
    if weights is not None:
        module.load_state_dict(weights)
    return weights is not None
