"""Settings of the Trainer: the callback leaves no trace under each of them, and counts right."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import timer
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.rules import FixedRadius
from tests.callbacks.modules import WithBatchNorm, build, fit, make_data
from tests.callbacks.passes.test_invariants import assert_no_trace

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling"),
]


class Validates(WithBatchNorm):
    """Has validation data."""

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    @override
    def val_dataloader(self) -> Any:
        return DataLoader(make_data(32, seed=3), batch_size=16)


# Each with the number of combined steps: two epochs of 6 batches, where nothing else is said.
SETTINGS: dict[str, tuple[dict[str, Any], int]] = {
    "overfit_batches": ({"overfit_batches": 3}, 6),
    "limit_train_batches": ({"limit_train_batches": 0.5}, 6),
    "limit_train_batches, accumulation": ({"limit_train_batches": 4, "accumulate_grad_batches": 3}, 4),
    "val_check_interval": ({"val_check_interval": 2}, 12),
    "val_check_interval over epochs": (
        {"val_check_interval": 5, "check_val_every_n_epoch": None, "accumulate_grad_batches": 3},
        4,
    ),
    "max_steps": ({"max_steps": 7}, 7),
    "max_steps, accumulation": ({"max_steps": 3, "accumulate_grad_batches": 4}, 3),
    "detect_anomaly": ({"detect_anomaly": True}, 12),
    "fast_dev_run": ({"fast_dev_run": 3}, 3),
    "inference_mode": ({"inference_mode": False}, 12),
    "reload_dataloaders_every_n_epochs": ({"reload_dataloaders_every_n_epochs": 1}, 12),
    "profiler": ({"profiler": "simple"}, 12),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_i1_and_counts(name: str) -> None:
    settings, steps = SETTINGS[name]
    assert assert_no_trace(Validates, "momentum", **settings).combined_steps == steps


class LeavesEpochsEarly(Validates):
    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None


def test_the_rest_of_an_epoch_is_skipped() -> None:
    """In the middle of a window: the next epoch opens a new one, and its means are over that one alone."""
    assert assert_no_trace(LeavesEpochsEarly, "momentum", accumulate_grad_batches=2).combined_steps == 2
    retain, forget = (DataLoader(ConcatDataset([make_data(16, seed)] * 6), batch_size=16) for seed in (0, 9))
    gramians = []

    class Look(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            gramians.append(callback.last_step and callback.last_step.gramian)

    # The batches are always the same, and the weights rest.
    callback = HAMUCallback(forget, HAMUQ(0.0, radius=FixedRadius(1e-12)))
    fit(build(LeavesEpochsEarly), callback, Look(), loader=retain, accumulate_grad_batches=2)
    torch.testing.assert_close(gramians[-1], gramians[1])


@pytest.mark.filterwarnings("ignore:You are trying to `self.log\\(\\)` but `Trainer\\(barebones=True\\)` is configured")
def test_barebones() -> None:
    only = {"logger": None, "log_every_n_steps": None, "enable_checkpointing": None, "enable_progress_bar": None}
    callback = assert_no_trace(Validates, barebones=True, enable_model_summary=None, **only)
    assert callback.combined_steps == 12


def test_max_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks at each look."""
    tick = itertools.count()
    monkeypatch.setattr(timer, "time", SimpleNamespace(monotonic=lambda: next(tick)))
    callback = assert_no_trace(Validates, max_time={"seconds": 11}, max_epochs=-1)
    assert 3 < callback.combined_steps < 12
