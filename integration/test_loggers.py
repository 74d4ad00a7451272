"""W&B without a network, MLflow in a folder, and CSV: what each gets of a fit that unlearns."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hamu_lightning import EvaluateUnlearning, HAMUCallback, Unseen

EXPECTED = {"forget/loss", "retain/loss", "hamu/kappa", "hamu/target", "hamu/auc", "eval/RA", "eval/FA", "eval/score"}


class Classifier(LightningModule):
    """Two classes, told apart by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def unlearn(logger: Logger) -> None:
    torch.manual_seed(0)
    retain, forget, holdout = (TensorDataset(torch.randn(size, 8), torch.arange(size) % 2) for size in (32, 16, 16))
    callbacks = [HAMUCallback(forget, target=Unseen(holdout)), EvaluateUnlearning()]
    trainer = Trainer(
        max_steps=4,
        log_every_n_steps=1,
        logger=logger,
        callbacks=callbacks,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    trainer.fit(Classifier(), DataLoader(retain, batch_size=16))


def test_csv(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    unlearn(logger)
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        assert {*(csv.DictReader(file).fieldnames or ())} >= EXPECTED


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more packages
    pytest.importorskip("mlflow")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/runs")
    unlearn(logger)
    assert {*logger.experiment.get_run(logger.run_id).data.metrics} >= EXPECTED


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(offline=True, save_dir=tmp_path)
    unlearn(logger)
    summary = {*logger.experiment.summary.keys()}
    logger.experiment.finish()
    assert summary >= EXPECTED | {"eval/losses", "eval/ranks"}
