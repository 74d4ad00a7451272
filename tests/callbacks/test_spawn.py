"""Processes that the Trainer starts, as in notebooks: the callback works in copies, and reports what they did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.rules import FixedRadius
from tests.callbacks.modules import Base, build, fit, make_data


class RanksAgree(Callback):
    """Each interpreter iterates over sets of strings in an order of its own: no step may depend on it."""

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        weights = pl_module.all_gather(nn.utils.parameters_to_vector(pl_module.parameters()).detach())
        assert len(weights) == 2 and torch.equal(weights[0], weights[1])


@pytest.mark.slow  # two processes import torch
def test_counts_come_back_to_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    module = build(Base)
    before = module.net[0].weight.detach().clone()
    forget = DataLoader(make_data(40, seed=9), batch_size=16)
    callback = HAMUCallback(forget, HAMUQ(0.02, radius=FixedRadius(0.05)), stop_on=["infeasible"])
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    loader = DataLoader(make_data(), batch_size=8)
    trainer, _ = fit(module, callback, RanksAgree(), loader=loader, strategy=strategy, devices=2)
    names = ("forget_passes", "combined_steps", "left_out_steps", "has_stopped")
    assert [float(trainer.callback_metrics[f"hamu/{name}"]) for name in names] == [12, 12, 0, 0]
    assert not torch.equal(before, module.net[0].weight)
    assert (callback.forget_passes, callback.combined_steps, callback.last_step) == (0, 0, None)
