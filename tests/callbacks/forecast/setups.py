"""What the tests of the preflight share."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, Chance, HAMUCallback
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.rules import RelativeRadius, TargetQuota
from tests.callbacks.modules import Base, build, fit, make_data
from tests.callbacks.passes.test_invariants import attributes

RULE = HAMUQ(0.02, radius=RelativeRadius(0.05))
TARGET = HAMUQ(TargetQuota(Chance()), radius=RelativeRadius(0.05))


def retain_loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(make_data(), batch_size=16, **{"shuffle": True, **options})


def states() -> list[Any]:
    """All global random states."""
    return [torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()]


def run(preflight: bool, kind: type[Base] = Base, rule: Any = RULE, **settings: Any) -> tuple[dict[str, Any], Any]:
    """A fit, all that is left of it, and the callback."""
    module = build(kind, settings.pop("optimizer", "sgd"))
    forget = settings.pop("forget", None)
    callback = HAMUCallback(
        forget, rule, preflight=preflight, passes=PassOptions(batchnorm=settings.pop("batchnorm", "freeze"))
    )
    trainer, recorder = fit(module, callback, **settings)
    found: dict[str, Any] = {name: value.tolist() for name, value in module.state_dict().items()}
    found |= {f"logged {name}": float(value) for name, value in trainer.callback_metrics.items()}
    found |= {"steps": recorder.values, "backwards": recorder.backwards, "random": states()}
    return found | attributes(module), callback


def gradients(module: Base, batch: Any) -> tuple[float, list[Any]]:
    loss = cross_entropy(module(batch[0]), batch[1])
    return loss.item(), [g.flatten().numpy() for g in torch.autograd.grad(loss, list(module.parameters()))]


class AsksForTrainer(Base):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (self.trainer.max_epochs or 1)


class ConfiguresWithTrainer(Base):
    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1 / self.trainer.estimated_stepping_batches)
