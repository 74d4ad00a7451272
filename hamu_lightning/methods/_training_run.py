"""A method that consists of training steps, called like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch import Callback, LightningModule

from hamu_lightning.checks import check_seed, check_type, store
from hamu_lightning.methods._fitting import fit
from hamu_lightning.methods._protocol import DataSource, Forget


@dataclass(frozen=True)
class TrainingRun:
    """Unlearns by a fit on the retain stream with a callback, such as `HAMUCallback` with any rule.

    The module's own optimizer is used. The copy is fitted by a Trainer of its own; the random numbers of the fit come
    from the seed, and the global ones go on as if nothing had happened.

    Args:
        callback_factory: Makes the callback from the data to forget and the seed: a callback serves one fit.
        options: Arguments of the Trainer, such as `{"max_epochs": 5}`.
        seed: Seed of the fit, and of the callback if the factory passes it on.
        observers: More callbacks for the fit.

    Raises:
        HAMUValueError: If an argument is of another kind.

    Example:
        >>> from hamu_lightning import HAMUQ, HAMUCallback
        >>> def make(forget, seed):
        ...     return HAMUCallback(forget, HAMUQ(quota=1e-3), batch_size=64, seed=seed)
        >>> TrainingRun(make, {"max_epochs": 5}).seed
        0
    """

    callback_factory: Callable[[Forget, int], Callback]
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    observers: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        check_type("callback_factory", self.callback_factory, Callable, "a function that makes the callback")
        check_type("options", self.options, Mapping, "a dict of arguments of the Trainer")
        check_type("observers", self.observers, list | tuple, "a list of callbacks")
        store(self, seed=check_seed(self.seed))

    def __call__(self, module: LightningModule, datamodule: DataSource, forget: Forget) -> LightningModule:
        """Return a copy that has been through the fit."""
        result = copy.deepcopy(module)
        callbacks = [self.callback_factory(forget, self.seed), *self.observers]
        fit(result, datamodule, self.options, self.seed, callbacks)
        return result

    def observed_by(self, observer: Callback) -> TrainingRun:
        """Return the same run with one more callback."""
        return replace(self, observers=(*self.observers, observer))
