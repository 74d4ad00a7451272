"""Small optimizers to wrap, the doors through which users hold them, and the step that is expected of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.rules import HAMUQ, FixedRadius, Rule

RULE = HAMUQ(0.05, radius=FixedRadius(0.1))
BASES: dict[str, Callable[[object], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),  # type: ignore[arg-type]
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),  # type: ignore[arg-type]
    "adam": lambda p: Adam(p, lr=0.1),  # type: ignore[arg-type]
    "adamw": lambda p: AdamW(p, lr=0.1, foreach=True),  # type: ignore[arg-type]
}


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def make_losses(model: nn.Module, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(2, 16, 4, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(3, (16,), generator=generator)
    return nn.functional.cross_entropy(model(x), targets), nn.functional.cross_entropy(model(y), targets)


def wrap_directly(model: nn.Module, rule: Rule = RULE, base: str = "sgd", **options: bool) -> HAMUOptimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HAMUOptimizer(BASES[base](model.parameters()), rule, **options)


def through_lightning(optimizer: HAMUOptimizer) -> Any:
    """What `self.optimizers()` hands out in a LightningModule."""
    module, trainer = LightningModule(), Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.automatic_optimization = False
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.strategy.optimizers = [optimizer]
    door: Any = module.optimizers()
    door.trainer = trainer  # it holds the strategy by a weak reference only
    return door


DOORS: dict[str, Callable[[HAMUOptimizer], Any]] = {
    "plain": lambda optimizer: optimizer,
    "lightning": through_lightning,
    "fabric": lambda optimizer: Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer),
}
Wrap: TypeAlias = Callable[..., HAMUOptimizer]


def take_step(optimizer: Optimizer, model: nn.Module, seed: int = 0) -> None:
    retain, forget = make_losses(model, seed)
    with optimizer.retain():  # type: ignore[attr-defined]
        retain.backward(retain_graph=True)
    with optimizer.forget():  # type: ignore[attr-defined]
        forget.backward()
    optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def expected_step(model: nn.Module, rule: Rule, lr: float, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """`d` from autograd and the rule, tensor by tensor, and the size of what is added up to it."""
    parameters = list(model.parameters())
    losses = make_losses(model, seed)
    grads = [[g.double() for g in torch.autograd.grad(loss, parameters, retain_graph=True)] for loss in losses]
    rows = [torch.stack((r.flatten(), f.flatten())) for r, f in zip(*grads, strict=True)]
    values = rule.coefficients(
        torch.stack([row @ row.T for row in rows]),
        lr=lr,
        weight_norms=torch.tensor([float(p.detach().norm()) for p in parameters]),
        sizes=torch.tensor([p.numel() for p in parameters]),
    ).values
    terms = [(c[0] * r, c[1] * f) for c, r, f in zip(values, *grads, strict=True)]
    return [(a + b, a.abs() + b.abs()) for a, b in terms]


class CountHostReads(TorchDispatchMode):
    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))
