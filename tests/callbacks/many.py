"""A module with several requests and a protected group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hamu_lightning import HAMUCallback
from hamu_lightning.rules import FixedRadius
from hamu_lightning.solvers import FeasibleDirection
from tests.callbacks.modules import make_data

RADIUS = FixedRadius(0.1)
DATA = {name: make_data(40, seed=seed) for seed, name in enumerate(("rare", "a", "b", "c"), start=20)}
RULE = FeasibleDirection({"a": 0.01, "b": 0.005}, {"rare": 0.0}, radius=RADIUS)


def loader(name: str, batch_size: int = 20, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(DATA[name], batch_size=batch_size, shuffle=shuffle)


def make_callback(rule: Any = RULE, **options: Any) -> HAMUCallback:
    forget = {name: loader(name) for name in rule.quota}
    return HAMUCallback(forget, rule, protect={name: loader(name) for name in rule.floor}, **options)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])
