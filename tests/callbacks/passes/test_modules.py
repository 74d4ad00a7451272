"""Modules whose parameters are frozen, shared, unused, or used by one stream only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.callbacks import StepOptions
from hamu_lightning.rules import FineTune, FixedRadius
from tests.callbacks.modules import Base, build, fit, make_data
from tests.callbacks.passes.test_invariants import GradientsAreEqual, SameRandomState, assert_no_trace

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")
RULE = HAMUQ(0.02, radius=FixedRadius(0.05))


class Frozen(Base):
    """The first layer is frozen, but the optimizer holds it."""

    def make_net(self) -> nn.Module:
        net = super().make_net()
        net[0].requires_grad_(False)  # type: ignore[index]
        return net


class OutsideOptimizer(Base):
    """The first layer gets gradients, but the optimizer does not hold it."""

    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[2].parameters(), lr=0.05)

    @override
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("outside", self.net[0].weight.grad.norm())  # never cleared


class Tied(Base):
    """The second layer is the first one, transposed; a third name points to the same tensor."""

    def make_net(self) -> nn.Module:
        self.encoder, self.decoder = nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)
        self.decoder.weight = self.encoder.weight
        return nn.Sequential(self.encoder, nn.ReLU(), self.decoder, nn.Linear(10, 3))


class Unused(Base):
    def make_net(self) -> nn.Module:
        self.unused = nn.Linear(2, 2)
        return super().make_net()


class TwoHeads(Base):
    """The retain stream uses one head, the forget stream (batches of 8) the other one."""

    def make_net(self) -> nn.Module:
        self.heads = nn.ModuleList([nn.Linear(16, 3), nn.Linear(16, 3)])
        return nn.Sequential(nn.Linear(10, 16), nn.ReLU())

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.heads[len(batch[0]) == 8](self.net(batch[0])), batch[1])


KINDS = [Frozen, OutsideOptimizer, Tied, Unused, TwoHeads]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_i1(kind: type[Base], optimizer: str) -> None:
    assert_no_trace(kind, optimizer, accumulate_grad_batches=4, gradient_clip_val=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_i2(kind: type[Base], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hamu_lightning.callbacks._group.RandomStream", SameRandomState)
    check = GradientsAreEqual()
    callback = HAMUCallback(list(DataLoader(make_data(), batch_size=16)), FineTune())
    fit(build(kind), callback, check, loader=DataLoader(make_data(), batch_size=16))
    assert check.steps == 12


MOVED: dict[type[Base], set[str]] = {
    Frozen: {"net.2.weight", "net.2.bias"},
    OutsideOptimizer: {"net.2.weight", "net.2.bias"},
    Tied: {"encoder.weight", "net.3.weight", "net.3.bias"},
    Unused: {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"},
    TwoHeads: {f"{layer}.{name}" for layer in ("net.0", "heads.0", "heads.1") for name in ("weight", "bias")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_moves(kind: type[Base]) -> None:
    """A tensor that two names share is one block, and each step gives the quota."""
    module = build(kind)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    forget = DataLoader(make_data(40, seed=9), batch_size=8)
    callback = HAMUCallback(forget, RULE, steps=StepOptions(track_actual=True))
    fit(module, callback)
    assert {name for name, p in module.named_parameters() if not torch.equal(p, before[name])} == MOVED[kind]
    report = callback.last_step
    assert report is not None and report.actual_improvements is not None
    assert sorted(label for label in report.labels if "unused" not in label) == sorted(MOVED[kind])
    assert float(report.actual_improvements[1]) == pytest.approx(0.02, rel=1e-3)  # weights in float32
