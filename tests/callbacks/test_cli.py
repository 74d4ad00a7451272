"""LightningCLI: the callback, its rule, radius, quota and target come from YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUU, Chance, HAMUCallback, Holdout, SecondChoice
from hamu_lightning.callbacks import Infeasible
from hamu_lightning.rules import (
    FineTune,
    FixedRadius,
    LearningRateRadius,
    RelativeQuota,
    RelativeRadius,
    Rule,
    TargetQuota,
)
from tests.callbacks.modules import Base, make_data

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The fit has ended before the target"),
    pytest.mark.filterwarnings("ignore:The forget loss is"),
]


class Data(LightningDataModule):
    @override
    def train_dataloader(self) -> Any:
        return DataLoader(make_data(), batch_size=16)

    @override
    def val_dataloader(self) -> Any:
        return DataLoader(make_data(32, seed=4), batch_size=16)

    def forget_dataloader(self) -> Any:
        return DataLoader(make_data(40, seed=9), batch_size=16)


class Validated(Base):
    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_mean", self(batch[0]).mean())


class Samples(Dataset[Any]):
    """A forget set that YAML can name."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return make_data(self.n, seed=9)[index]


RULES: dict[str, tuple[str, Rule]] = {
    "radius": (
        """
        rule:
          class_path: hamu_lightning.HAMUQ
          init_args:
            quota: 1e-2
            radius: {class_path: hamu_lightning.rules.RelativeRadius, init_args: {fraction: 0.05}}
            allocation: optimal
            blocks: layer
            on_infeasible: skip
        """,
        HAMUQ(0.01, radius=RelativeRadius(0.05), allocation="optimal", blocks="layer", on_infeasible="skip"),
    ),
    "relative quota": (
        """
        rule:
          class_path: hamu_lightning.rules.HAMUU
          init_args:
            quota: {class_path: hamu_lightning.rules.RelativeQuota, init_args: {fraction: 0.1}}
            radius: {class_path: hamu_lightning.rules.FixedRadius, init_args: {radius: 0.05}}
        """,
        HAMUU(RelativeQuota(0.1), radius=FixedRadius(0.05)),
    ),
    "target quota": (
        """
        rule:
          class_path: hamu_lightning.HAMUQ
          init_args:
            quota:
              class_path: hamu_lightning.rules.TargetQuota
              init_args: {target: {class_path: hamu_lightning.Chance, init_args: {num_classes: 10}}, steps: 3}
            radius: {class_path: hamu_lightning.rules.LearningRateRadius}
        """,
        HAMUQ(TargetQuota(Chance(10), steps=3), radius=LearningRateRadius()),
    ),
    "answers": (
        "target: {class_path: hamu_lightning.SecondChoice}",
        HAMUQ(TargetQuota(SecondChoice()), radius=RelativeRadius(2e-3), blocks="global"),
    ),
    "target": ("target: 2.5", HAMUQ(TargetQuota(2.5), radius=RelativeRadius(2e-3), blocks="global")),
    "chance, by its name": (
        "target: hamu_lightning.Chance",
        HAMUQ(TargetQuota(Chance()), radius=RelativeRadius(2e-3), blocks="global"),
    ),
    "the validation data": (
        "target: {class_path: hamu_lightning.Holdout}",
        HAMUQ(TargetQuota(Holdout()), radius=RelativeRadius(2e-3), blocks="global"),
    ),
    "the validation data, measured less often": (
        "target: {class_path: hamu_lightning.Holdout, init_args: {every: 3}}",
        HAMUQ(TargetQuota(Holdout(every=3)), radius=RelativeRadius(2e-3), blocks="global"),
    ),
    "fine-tuning": ("rule: {class_path: hamu_lightning.rules.FineTune}", FineTune()),
}

CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    class_path: hamu_lightning.HAMUCallback
    init_args: {passes: {batchnorm: retain, every_n_steps: 2}, stop_on: [infeasible], seed: 3}
"""


@pytest.mark.parametrize(("name", "forget"), [*((name, "hook") for name in RULES), ("radius", "dataset")])
def test_from_yaml(name: str, forget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, rule = RULES[name]
    config = yaml.safe_load(CONFIG)
    arguments = config["trainer"]["callbacks"]["init_args"]
    arguments.update(yaml.safe_load(text))
    if forget == "dataset":
        arguments["forget"] = {"class_path": f"{__name__}.Samples", "init_args": {"n": 40}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls
    monkeypatch.setattr("sys.argv", ["main.py", "fit", "--config", str(tmp_path / "config.yaml")])
    cli = LightningCLI(Validated, Data, save_config_callback=None)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, HAMUCallback))  # type: ignore[attr-defined]
    assert callback.settings.rule == rule
    assert callback.settings.stop_on == (Infeasible(),)
    assert (callback.settings.passes.every_n_steps, callback.settings.seed) == (2, 3)
    assert isinstance(callback.settings.forget, Samples) == (forget == "dataset")
    assert callback.forget_passes > 0


def test_held_out_data_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load(CONFIG)
    data = {"class_path": f"{__name__}.Samples", "init_args": {"n": 24}}
    target = {"class_path": "hamu_lightning.Holdout", "init_args": {"data": data}}
    config["trainer"]["callbacks"]["init_args"]["target"] = target
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr("sys.argv", ["main.py", "fit", "--config", str(tmp_path / "config.yaml")])
    cli = LightningCLI(Validated, Data, save_config_callback=None)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, HAMUCallback))  # type: ignore[attr-defined]
    held_out = callback.settings.rule.target_quotas["forget"].target.data  # type: ignore[union-attr]
    assert isinstance(held_out, Samples) and len(held_out) == 24
    assert callback.forget_passes > 0
