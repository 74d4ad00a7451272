"""torch.compile and gradient checkpointing: two passes instead of one compile nothing more, and leave no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUCallback
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.rules import FineTune
from tests.callbacks.modules import Base, WithBatchNorm, WithDropout, build, fit, make_data
from tests.callbacks.passes.test_invariants import GradientsAreEqual, SameRandomState, assert_no_trace

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


class CompiledNet(WithBatchNorm):
    def make_net(self) -> nn.Module:
        self.counter = CompileCounterWithBackend("aot_eager")
        return torch.compile(super().make_net(), backend=self.counter)  # type: ignore[return-value]


class CompiledWhole(Base):
    """Fitted as `fit(torch.compile(module))`, where `self.log` cannot be traced, with or without the callback.

    What it mutates is seen by the guards of the compiled code.
    """

    def make_net(self) -> nn.Module:
        self.counter = CompileCounterWithBackend("aot_eager")
        self.norm, self.hidden, self.is_first = nn.BatchNorm1d(16), torch.zeros(16), True
        return nn.Sequential(nn.Linear(10, 16), self.norm, nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0] + self.hidden.mean())
        self.hidden, self.is_first = self.norm.running_mean.clone(), not self.is_first  # type: ignore[union-attr]
        return cross_entropy(logits, batch[1]) * (2 if self.is_first else 1)


def train(kind: type[Base], batchnorm: Any = None) -> tuple[Base, list[int]]:
    """Fit, without the callback where `batchnorm` is None; also return how much was compiled after each batch."""
    torch._dynamo.reset()
    counters.clear()
    module = build(kind)
    compiled: list[int] = []

    class Look(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            compiled.append(module.counter.frame_count + sum(counters["graph_break"].values()))

    whole = torch.compile(module, backend=module.counter) if kind is CompiledWhole else module
    forget = DataLoader(make_data(48, seed=9), batch_size=16, shuffle=True)
    callback = [] if batchnorm is None else [HAMUCallback(forget, FineTune(), passes=PassOptions(batchnorm=batchnorm))]
    fit(whole, *callback, Look())  # type: ignore[arg-type]
    assert compiled[-1] > 0
    return module, compiled


@pytest.mark.parametrize("kind", [CompiledNet, CompiledWhole])
def test_compiled_modules(kind: type[Base]) -> None:
    """No recompilation or graph break that plain training does not have, in either mode; and no trace."""
    (plain, expected), (paired, compiled) = train(kind), train(kind, "retain")
    assert compiled == expected
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), paired.state_dict().values(), strict=True)
    )
    assert train(kind, "freeze")[1] == expected


class Checkpointed(WithDropout):
    is_reentrant = False

    @override
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x.requires_grad_(), use_reentrant=self.is_reentrant)  # type: ignore[no-any-return]


class CheckpointedReentrant(Checkpointed):
    is_reentrant = True


@pytest.mark.parametrize("kind", [Checkpointed, CheckpointedReentrant])
def test_gradient_checkpointing(kind: type[Base], monkeypatch: pytest.MonkeyPatch) -> None:
    """I1 and I2: the forward pass that backward repeats belongs to the forget pass too."""
    assert_no_trace(kind, accumulate_grad_batches=4)
    monkeypatch.setattr("hamu_lightning.callbacks._group.RandomStream", SameRandomState)
    batches, check = list(DataLoader(make_data(), batch_size=16)), GradientsAreEqual()
    fit(build(kind), HAMUCallback(batches, FineTune()), check, loader=DataLoader(make_data(), batch_size=16))
    assert check.steps == 12
