"""I1: the forget pass leaves no trace. I2: on the retain batch, the forget gradient is the retain gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from hamu_lightning import HAMUCallback
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.randomness import RandomStream
from hamu_lightning.rules import FineTune
from tests.callbacks.modules import MODULES, Base, WithBatchNorm, WithDropout, build, fit, make_data

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


def forget_loader(workers: int = 0) -> DataLoader[Any]:
    return DataLoader(make_data(40, seed=9), batch_size=16, shuffle=True, num_workers=workers)


def attributes(module: Base) -> dict[str, str]:
    """The module's own plain attributes, in words."""
    skipped = {"_trainer", "_modules", "_parameters", "_buffers", "_metric_attributes", "generator"}
    return {name: str(value) for name, value in module.__dict__.items() if name not in skipped}


def assert_no_trace(kind: type[Base], optimizer: str = "sgd", **settings: Any) -> HAMUCallback:
    plain, paired = build(kind, optimizer), build(kind, optimizer)
    trainer, expected = fit(plain, **settings)
    callback = HAMUCallback(
        forget_loader(settings.get("workers", 0)), FineTune(), passes=PassOptions(batchnorm="retain")
    )
    other, recorded = fit(paired, callback, **settings)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, paired.state_dict()[name]), name
    assert recorded.values == expected.values
    assert recorded.backwards == expected.backwards
    assert attributes(paired) == attributes(plain)
    assert callback.forget_passes == len(expected.values)
    assert other.global_step == trainer.global_step == callback.combined_steps + callback.left_out_steps
    for name, value in trainer.callback_metrics.items():
        assert torch.equal(value, other.callback_metrics[name]), name
    return callback


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("clipping", [None, 0.5])
def test_i1_no_trace(kind: type[Base], optimizer: str, accumulation: int, clipping: float | None) -> None:
    """With 6 batches and windows of 4, the last window of each epoch is short."""
    assert_no_trace(kind, optimizer, accumulate_grad_batches=accumulation, gradient_clip_val=clipping)


@pytest.mark.parametrize("kind", [WithBatchNorm, WithDropout])
def test_i1_with_loader_workers(kind: type[Base]) -> None:
    assert_no_trace(kind, workers=2)


class SameRandomState(RandomStream):
    """For I2: the forget pass draws what the retain pass will draw."""

    def reseed(self) -> None:
        pass


class GradientsAreEqual(Callback):
    steps = 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps += 1
        retain = [p.grad for p in pl_module.parameters()]
        with trainer.optimizers[0].forget():
            for parameter, grad in zip(pl_module.parameters(), retain, strict=True):
                assert (grad is None) == (parameter.grad is None)
                assert grad is None or torch.equal(grad, parameter.grad)


def assert_self_cancellation(
    monkeypatch: pytest.MonkeyPatch, kind: type[Base], batchnorm: Any = "freeze", **settings: Any
) -> None:
    monkeypatch.setattr("hamu_lightning.callbacks._group.RandomStream", SameRandomState)
    same = DataLoader(make_data(), batch_size=16)
    check = GradientsAreEqual()
    # A list of batches: `iter()` of a DataLoader would draw from the random state that is to be the same.
    callback = HAMUCallback(
        list(DataLoader(make_data(), batch_size=16)), FineTune(), passes=PassOptions(batchnorm=batchnorm)
    )
    fit(build(kind), callback, check, loader=same, **settings)
    assert check.steps == callback.combined_steps > 0


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("batchnorm", ["freeze", "retain"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_i2_self_cancellation(
    kind: type[Base], batchnorm: Any, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_self_cancellation(monkeypatch, kind, batchnorm, accumulate_grad_batches=accumulation)
