"""Each objective is clipped on its own, as Lightning clips the retain gradient; hooks see the retain gradient alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.rules import FineTune, FixedRadius, Rule
from tests.callbacks.modules import Base, build, fit, make_data

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")
RULE = HAMUQ(1e-4, radius=FixedRadius(1e-3))


class LogsNorm(Base):
    """Logs the norm of its gradient, and writes down what its hooks see."""

    @override
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        self.log("norm", torch.stack(norms).norm())


class OwnClipping(LogsNorm):
    """Clips the first layer alone, and logs from there."""

    @override
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        assert optimizer is self.trainer.optimizers[0]
        norm = torch.nn.utils.clip_grad_norm_(self.net[0].parameters(), 0.02)
        self.log("own", norm, on_step=True, on_epoch=True)


class ThroughLightning(LogsNorm):
    """Gives its own settings to Lightning's clipping."""

    @override
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


def own_clipping_of_an_instance(seed: int = 5) -> LogsNorm:
    """As in a project that patches the hook onto its module."""
    module = build(LogsNorm, seed=seed)
    clip = functools.partial(OwnClipping.configure_gradient_clipping, module)
    module.configure_gradient_clipping = clip  # type: ignore[method-assign, assignment]
    return module


def clip_by_norm(grads: list[Tensor], limit: float) -> list[Tensor]:
    norm = torch.cat([g.flatten() for g in grads]).norm()
    return [g * min(1.0, limit / (float(norm) + 1e-6)) for g in grads]  # the 1e-6 is torch's


CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "norm": (lambda: build(LogsNorm), {"gradient_clip_val": 0.05}, lambda g: clip_by_norm(g, 0.05)),
    "value": (
        lambda: build(LogsNorm),
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        lambda g: [x.clamp(-0.01, 0.01) for x in g],
    ),
    "own": (lambda: build(OwnClipping), {}, lambda g: [*clip_by_norm(g[:2], 0.02), *g[2:]]),
    "own, of the instance": (
        own_clipping_of_an_instance,
        {},
        lambda g: [*clip_by_norm(g[:2], 0.02), *g[2:]],
    ),
    "own, through Lightning": (lambda: build(ThroughLightning), {}, lambda g: clip_by_norm(g, 0.05)),
    "none": (lambda: build(LogsNorm), {}, lambda g: g),
}


def gradients(module: Base, data: Any) -> list[Tensor]:
    loss = torch.nn.functional.cross_entropy(module(data.tensors[0]), data.tensors[1])
    return list(torch.autograd.grad(loss, list(module.parameters())))


def run(module: Base, rule: Rule, **settings: Any) -> tuple[HAMUCallback, list[dict[str, float]]]:
    """Both sets in one window: in one batch, or in micro-batches of a third."""
    n = settings.get("accumulate_grad_batches", 1)
    callback = HAMUCallback(DataLoader(make_data(48, 9), batch_size=48 // n), rule)
    trainer, recorder = fit(module, callback, loader=DataLoader(make_data(96), batch_size=96 // n), **settings)
    return callback, recorder.values


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_each_objective_is_clipped_on_its_own(name: str, accumulation: int, precision: Any) -> None:
    make, settings, clip = CASES[name]
    module = make()
    rows = [clip(gradients(module, data)) for data in (make_data(96), make_data(48, 9))]
    grads = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    callback, _ = run(module, RULE, accumulate_grad_batches=accumulation, precision=precision, max_steps=1, **settings)
    assert callback.last_step is not None
    # Sums in float32; or products in float16, with 11 bits.
    tolerance = 1e-5 if precision == "32-true" else 5e-3
    torch.testing.assert_close(
        callback.last_step.gramian.sum(0), grads @ grads.T, rtol=tolerance, atol=tolerance * 1e-3
    )


class Hooks(Callback):
    """Writes down the gradient that other callbacks see before the step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    @override
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(torch.cat([p.grad.flatten().clone() for p in pl_module.parameters()]))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}, {"precision": "16-mixed"}], ids=repr)
def test_hooks_see_the_retain_gradient(name: str, settings: dict[str, Any]) -> None:
    """And what a module logs in its hooks, clipping among them, is that of plain training."""
    make, clipping, _ = CASES[name]
    loader = DataLoader(make_data(96), batch_size=16)
    plain, paired = Hooks(), Hooks()
    _, expected = fit(make(), plain, loader=loader, **clipping, **settings)
    callback = HAMUCallback(DataLoader(make_data(48, 9), batch_size=16), FineTune())
    _, recorder = fit(make(), callback, paired, loader=loader, **clipping, **settings)
    assert len(plain.seen) == len(paired.seen) and "norm" in expected.values[-1]
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, paired.seen, strict=True))
    assert recorder.values == expected.values
