"""Masks for small models, and what has to rest outside of them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.rules import (
    GRU,
    HAMUQ,
    HAMUU,
    MGDA,
    FineTune,
    FixedRadius,
    GradDiff,
    LearningRateRadius,
    RelativeRadius,
    Rule,
)
from hamu_lightning.solvers import FeasibleDirection
from tests.optim.doors import BASES, RULE

RULES: list[Rule] = [
    RULE,
    HAMUQ(1e-3, radius=LearningRateRadius(), blocks="global"),
    HAMUQ(0.01, radius=RelativeRadius(0.01), allocation="optimal"),
    HAMUU(1e-3),
    FeasibleDirection({"forget": 0.01}, radius=FixedRadius(0.1)),
    GradDiff(0.5),
    GRU(),
    MGDA(),
    FineTune(),
]


def make_mask(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in model.named_parameters()}


def wrap(model: nn.Module, rule: Rule = RULE, base: str = "sgd", mask: Any = None, **options: bool) -> HAMUOptimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HAMUOptimizer(BASES[base](model.parameters()), rule, model.named_parameters(), mask=mask, **options)


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_rest(model: nn.Module, before: dict[str, Tensor], mask: dict[str, Tensor]) -> None:
    """Outside of the mask nothing has moved by a bit; inside something has."""
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[~mask[name]], before[name][~mask[name]]), name
    assert any(not torch.equal(p[mask[n]], before[n][mask[n]]) for n, p in model.named_parameters())


class Scattered(nn.Module):
    """The same function, in which only the weights inside of the mask are parameters."""

    def __init__(self, model: nn.Module, mask: dict[str, Tensor]) -> None:
        super().__init__()
        self.net, self.mask = [copy.deepcopy(model).requires_grad_(False)], mask  # a list: no submodule
        self.parts = nn.ParameterDict()  # which would sort a dict
        for name, parameter in model.named_parameters():
            self.parts[name.replace(".", "/")] = nn.Parameter(parameter.detach()[mask[name]])

    def forward(self, x: Tensor) -> Tensor:
        state = {
            name: p.masked_scatter(self.mask[name], self.parts[name.replace(".", "/")])
            for name, p in self.net[0].named_parameters()
        }
        return torch.func.functional_call(self.net[0], state, (x,))
