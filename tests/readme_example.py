"""The README's example as a program, with a small model and small data: `python readme_example.py` beside README.md.

`make wheel` runs it with the installed package, so it imports nothing of the tests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class MyModule(LightningModule):
    """Two classes, told apart by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_data(samples: int) -> TensorDataset:
    """Odd samples are of class 1."""
    return TensorDataset(torch.randn(samples, 32), torch.arange(samples) % 2)


def read_code(readme: str) -> str:
    """The project as it is once the lines of the diff are added, and the others gone."""
    (diff,) = re.findall(r"```diff\n(.*?)```", readme, re.DOTALL)
    return "".join(line[2:] or "\n" for line in diff.splitlines(keepends=True) if not line.startswith("-"))


def run(code: str, indices: list[int], steps: int) -> dict[str, Any]:
    """Train the model of the checkpoint that the code loads, in the present folder, then run it."""
    train_dataset = make_data(16)
    trainer = Trainer(max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(MyModule(), DataLoader(train_dataset, batch_size=8))
    trainer.save_checkpoint("trained.ckpt")
    names: dict[str, Any] = {"train_dataset": train_dataset, "indices_to_forget": indices, "val_dataset": make_data(8)}
    names |= {"MyModule": MyModule, "Trainer": Trainer, "DataLoader": DataLoader}
    assert code.count("max_steps=100") == 1
    exec(code.replace("max_steps=100", f"max_steps={steps}"), names)
    assert names["callback"].forget_passes > 0
    assert Path("unlearned.ckpt").exists()
    return names


if __name__ == "__main__":
    import hamu_lightning

    run(read_code(Path("README.md").read_text(encoding="utf-8")), [0, 3, 5], steps=20)
    print(f"README.md works with {hamu_lightning.__version__} of {Path(hamu_lightning.__file__).parent}.")
