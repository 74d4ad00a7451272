"""Modules whose streams cannot be paired, as docs/projects.md says, and that the user sees the module's own error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, split_forget
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.rules import RelativeRadius
from tests.callbacks.modules import Base, build, fit, make_data

RULE = HAMUQ(0.02, radius=RelativeRadius(0.05))


class AllSeries(Base):
    """Weights for each of eight series: a batch `[time, series]` must hold all of them."""

    def make_net(self) -> nn.Module:
        return nn.Linear(8, 8)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self(batch[0][:-1]) - batch[0][1:]).square().mean()


def windows(series: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(48, series, generator=torch.Generator().manual_seed(1))), batch_size=8)


def test_a_multivariate_model_forgets_times_but_not_series() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(build(AllSeries), HAMUCallback(windows(2), RULE), loader=windows(8))
    callback = HAMUCallback(windows(8), RULE)
    fit(build(AllSeries), callback, loader=windows(8))
    assert callback.combined_steps == 12


class Stateful(Base):
    """Carries its hidden state on, for batches of one size."""

    def make_net(self) -> nn.Module:
        self.hidden: Tensor | None = None
        self.head = nn.Linear(8, 3)
        return nn.GRU(5, 8, batch_first=True)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out, hidden = self.net(batch[0].view(-1, 2, 5), self.hidden)
        self.hidden = hidden.detach()
        return cross_entropy(self.head(out[:, -1]), batch[1])


def test_a_stateful_rnn_needs_equal_batch_sizes() -> None:
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 8, 8\), got \[1, 16, 8\]"):
        module, forget = build(Stateful), DataLoader(make_data(40), batch_size=8)
        fit(module, HAMUCallback(forget, RULE), loader=DataLoader(make_data(), batch_size=16))
    callback = HAMUCallback(DataLoader(make_data(40), batch_size=16, drop_last=True), RULE)
    fit(build(Stateful), callback, loader=DataLoader(make_data(), batch_size=16))
    assert callback.combined_steps == 12


class AutoDecoder(Base):
    """A code of its own for each sample, and a decoder for all."""

    def make_net(self) -> nn.Module:
        self.codes = nn.Embedding(96, 4)
        return nn.Linear(4, 10)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self(self.codes(batch[0])) - batch[1]).square().mean()


def test_parameters_per_sample_are_outside_the_conflict() -> None:
    """No retain gradient protects the codes of what is forgotten, so that forgetting is cheapest there."""
    moved, protected = [], []

    class Look(Callback):
        @override
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            protected.append(bool(pl_module.codes.weight.grad[:8].any()))

        @override
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            moved.append(pl_module.codes.weight[:8].detach().clone())

    retain, forget = split_forget(TensorDataset(torch.arange(96), make_data().tensors[0]), range(8))
    rule = HAMUQ(0.02, radius=RelativeRadius(0.05), allocation="optimal")
    loader = DataLoader(retain, batch_size=16)
    fit(build(AutoDecoder), HAMUCallback(DataLoader(forget, batch_size=8), rule), Look(), loader=loader)
    assert not any(protected) and not torch.equal(moved[0], moved[-1])


class JumpsByItself(Base):
    """Its weights are not torch's to train: it moves them inside `training_step`, as JAX and Pyro's SVI do."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        for parameter, grad in zip(self.parameters(), torch.autograd.grad(loss, [*self.parameters()]), strict=True):
            parameter.data.sub_(grad, alpha=0.05)
        return loss.detach()


def test_a_module_that_trains_itself() -> None:
    with pytest.raises(HAMUStateError, match="Expected the forget loss to depend on the weights, but it has no graph"):
        fit(build(JumpsByItself), HAMUCallback(make_data(40), RULE))
