"""The Python code of the guide runs as it stands, page by page, with small data for what a user brings along."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

DOCS = Path(__file__).parent.parent / "docs"

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:The fit has ended before the target:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
]


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


def make_data(samples: int) -> TensorDataset:
    return TensorDataset(torch.randn(samples, 8), torch.arange(samples) % 2)


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the blocks of a page one after the other in one namespace."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        exec(block.replace("max_steps=100", "max_steps=3, enable_progress_bar=False"), names)
    return names


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def test_choosing(capsys: pytest.CaptureFixture[str]) -> None:
    names = {"forget": make_data(8), "val_dataset": make_data(8), "module": Classifier()}
    names |= {f"{name}_loader": DataLoader(make_data(16), batch_size=8) for name in ("retain", "forget")}
    run("choosing.md", names)
    assert "quota" in capsys.readouterr().out


def test_deletion_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "forget_ids.csv").write_text("customer_id\nc1\nc3\nnobody\n")
    names = {name: make_data(24) for name in ("train_dataset", "val_dataset", "test_dataset")}
    names |= {"owners": [f"c{number % 8}" for number in range(24)], "module": Classifier(), "retrained": Classifier()}
    done = run("deletion_requests.md", names)
    said = capsys.readouterr().out
    assert "6 samples of 2 people; 1 ids are not in the data" in said
    assert "HAMU: 3 combined steps" in said
    assert done["page"].exists()


def test_many_gpus() -> None:
    assert run("many_gpus.md", {})["trainer"].num_devices == 2


def test_loggers() -> None:
    assert len(run("loggers.md", {})["trainer"].loggers) == 2
