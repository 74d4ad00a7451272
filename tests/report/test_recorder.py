"""StepRecorder keeps what each combined step reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.optim import StepReport
from hamu_lightning.report import StepHistory, StepRecorder
from hamu_lightning.rules import FixedRadius


class Keeper(Callback):
    """Keeps the reports themselves."""

    def __init__(self, hamu: HAMUCallback) -> None:
        self.hamu, self.reports = hamu, list[StepReport]()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = self.hamu.last_step
        if step is not None and not any(step is report for report in self.reports):
            self.reports.append(step)


def record(tmp_path: Path, order: int = 1, **options: Any) -> tuple[StepHistory, list[StepReport], Trainer]:
    torch.manual_seed(0)
    hamu = HAMUCallback(DataLoader(RandomDataset(32, 6), batch_size=2), HAMUQ(quota=0.01, radius=FixedRadius(0.1)))
    recorder, keeper = StepRecorder(hamu), Keeper(hamu)
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[hamu, recorder, keeper][::order],
        **options,
    )
    trainer.fit(BoringModel(), DataLoader(RandomDataset(32, 8), batch_size=2))
    return recorder.history(), keeper.reports, trainer


quiet = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


@quiet
@pytest.mark.parametrize("order", [1, -1])
def test_every_step_is_recorded(tmp_path: Path, order: int) -> None:
    history, reports, _ = record(tmp_path, order)
    assert history.steps.tolist() == [1, 2, 3, 4]
    assert history.labels == ("layer.weight", "layer.bias")
    for i, report in enumerate(reports):
        # The same numbers, copied: equal to the bit.
        assert torch.equal(history.kappa[i], report.kappa)
        assert torch.equal(torch.stack((history.kappa_1[i], history.kappa_2[i])), torch.stack(report.thresholds))
        torch.testing.assert_close(history.kappa[i] / history.norms[i], report.cosine)
        assert history.quota[i] == report.coefficients.total_quota
        assert history.retain_improvement[i] == report.coefficients.retain_improvement
        assert history.forget_improvement[i] == report.coefficients.forget_improvement
        assert history.margin[i] == report.coefficients.margin


@quiet
def test_a_window_of_accumulation_counts_once(tmp_path: Path) -> None:
    history, reports, _ = record(tmp_path, accumulate_grad_batches=2)
    assert history.steps.tolist() == [1, 2] and len(reports) == 2


def test_nothing_recorded() -> None:
    history = StepRecorder(HAMUCallback(forget=[...], rule=HAMUQ(quota=0.1))).history()
    assert history.labels == () and history.kappa.shape == (0, 0) and history.margin.shape == (0,)
