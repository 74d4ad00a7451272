"""What a person sees while a fit runs: the progress bar, the lines after it, points in the log, a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hamu_lightning import HAMUCallback
from hamu_lightning.rules import HAMUQ, RelativeRadius

RULE = HAMUQ(quota=1e-3, radius=RelativeRadius(1e-3))
pytestmark = [
    pytest.mark.filterwarnings("ignore:The fit has ended before the target:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]


class Net(LightningModule):
    """Three classes; trained where `sure` is large."""

    def __init__(self, sure: float = 1.0) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.net.weight).data.mul_(sure)

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def make_data(size: int, seed: int) -> TensorDataset:
    labels = torch.arange(size) % 3
    noise = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(3 * nn.functional.one_hot(labels, 3) + 0.5 * noise, labels)


def fit(hamu: HAMUCallback, *callbacks: Callback, steps: int = 7, sure: float = 1.0, **settings: Any) -> Trainer:
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    options |= {"enable_progress_bar": False, "accelerator": "cpu", "max_steps": steps}
    trainer = Trainer(**{**options, **settings}, callbacks=[hamu, *callbacks])
    trainer.fit(Net(sure), DataLoader(make_data(24, 0), batch_size=8))
    return trainer


class Shown(Callback):
    """Notes what the bar shows after each batch."""

    def __init__(self) -> None:
        self.first: list[tuple[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.first.append(next(iter(trainer.progress_bar_callback.get_metrics(trainer, pl_module).items())))


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_the_bar_shows_the_forget_loss_first(kind: Any, tmp_path: Path) -> None:
    shown, bar = Shown(), kind()
    hamu = HAMUCallback(make_data(8, 1), target=0.9)
    settings: dict[str, Any] = {"enable_progress_bar": True, "logger": CSVLogger(tmp_path)}
    fit(hamu, shown, bar, steps=2, **settings)
    (name, text), (_, last) = shown.first
    level, target = text.split("/")
    assert (name, target) == ("forget", "0.9")
    assert 0 < float(level) < float(last.split("/")[0]) < 0.9
    assert "get_metrics" not in vars(bar)


def test_without_a_target_the_bar_shows_the_loss(tmp_path: Path) -> None:
    shown = Shown()
    trainer = fit(HAMUCallback(make_data(8, 1), RULE), shown, TQDMProgressBar(), steps=1, enable_progress_bar=True)
    assert shown.first == [("forget", f"{float(trainer.callback_metrics['forget/loss']):.3g}")]


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_our_lines_come_after_the_bar(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    before: list[str] = []

    class Closing(kind):
        def teardown(self, *args: Any, **named: Any) -> None:
            super().teardown(*args, **named)
            before.append(caplog.text)

    bar = Closing()
    fit(HAMUCallback(make_data(8, 1), target=0.16), bar, steps=60, enable_progress_bar=True)
    assert "HAMU stops at step" not in before[0] and "combined steps" not in before[0]
    assert caplog.text.index("HAMU stops at step") < caplog.text.index("combined steps")
    assert "teardown" not in vars(bar)


def read_steps(folder: Path) -> list[int]:
    header, *lines = (folder / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    names = header.split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines]
    return [int(row["step"]) for row in rows if row["hamu/quota"]]


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [
        (3, 50, [0, 1, 2]),
        (100, 50, [0, *range(4, 100, 5)]),
        (47, 50, [0, *range(1, 47, 2), 46]),
        (100, 1, [*range(100)]),
    ],
)
def test_twenty_points_the_first_and_the_last(steps: int, every: int, expected: list[int], tmp_path: Path) -> None:
    fit(HAMUCallback(make_data(8, 1), RULE), steps=steps, log_every_n_steps=every, logger=CSVLogger(tmp_path))
    assert read_steps(tmp_path) == expected


def test_the_last_levels_are_there_at_the_end() -> None:
    hamu = HAMUCallback(make_data(8, 1), target=0.9)
    trainer = fit(hamu, steps=4, log_every_n_steps=50)
    assert {"hamu/score", "hamu/forget_level", "hamu/target", "hamu/quota"} <= {*trainer.callback_metrics}
    table = hamu.forgotten_samples["forget"]
    level = trainer.callback_metrics["hamu/forget_level"]
    # Between measurements a level is raised by what steps promise, which holds to first order.
    torch.testing.assert_close(level.double(), table.loss_after.mean(), rtol=1e-3, atol=0)


def test_a_model_that_was_never_trained_is_said() -> None:
    with pytest.warns(UserWarning, match=r"first batch is 1.1, and a guess .* costs 1.1: the weights .* not loaded"):
        fit(HAMUCallback(make_data(8, 1), RULE), sure=1e-4, steps=1)
    with pytest.warns(UserWarning) as caught:  # of something, so that a guess would be seen
        fit(HAMUCallback(make_data(8, 1), target=9.0), sure=1.0, steps=1)
    assert not [warning for warning in caught if "a guess" in str(warning.message)]
