"""The code in README.md runs as it stands, with small data for the names that a user brings along."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

README = (Path(__file__).parent.parent / "README.md").read_text()
CALLBACK, OPTIMIZER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:The fit has ended before the target:UserWarning"),
]


class Classifier(BoringModel):
    """Two classes, told apart by one layer."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_data(samples: int) -> TensorDataset:
    return TensorDataset(torch.randn(samples, 32), torch.arange(samples) % 2)


# The README's other ways to say what to forget replace the first one in the same block. Odd samples are of class 1.
@pytest.mark.parametrize(
    ("how", "indices"),
    [
        ("target=Unseen(val_dataset)", [0, 3, 5]),
        ("target=Unseen()", [*range(1, 16, 2)]),
        ("target=Holdout(val_dataset)", [0, 3, 5]),
        ("rule=HAMUQ(quota=1e-3)", [0, 3, 5]),
    ],
)
def test_callback(how: str, indices: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert how in README
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "module": Classifier(),
        "train_dataset": make_data(16),
        "indices_to_forget": indices,
        "val_dataset": make_data(8),
        "DataLoader": DataLoader,
    }
    code = CALLBACK.replace("target=Unseen(val_dataset)", how).replace("max_steps=100", "max_steps=3")
    assert code.count("max_steps=3") == 1
    exec("from hamu_lightning import *\n" + code, names)
    assert names["callback"].forget_passes > 0


def test_many_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/many_requests.md."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "many_requests.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {f"loader_{name}": DataLoader(make_data(8), batch_size=4) for name in "abc"}
    exec(code, names)
    trainer = Trainer(max_epochs=1, callbacks=[names["callback"]], logger=False, enable_progress_bar=False)
    trainer.fit(Classifier(), DataLoader(make_data(16), batch_size=4))
    assert names["callback"].combined_steps == 4


def test_optimizer() -> None:
    model = nn.Linear(3, 1)
    retain_loss, forget_loss = (model(torch.randn(4, 3)).square().mean() for _ in range(2))
    names = {"torch": torch, "model": model, "retain_loss": retain_loss, "forget_loss": forget_loss}
    exec(OPTIMIZER, names)
    assert "forget_improvement" in repr(names["report"])
