"""LightningModules of the kinds that leave traces, and a small fit to put them through."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

OPTIMIZERS: dict[str, Any] = {  # Adam's usual epsilon, 1e-8, is 0 in float16
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-4),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-4),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-4, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-4, fused=True),
    "sgd, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
}


class Base(LightningModule):
    """A classifier of ten numbers into three classes."""

    optimizer = "sgd"

    def __init__(self) -> None:
        super().__init__()
        self.net = self.make_net()

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    @override
    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


class WithBatchNorm(Base):
    """BatchNorm, a torchmetrics object that is logged, a dict as the step's output."""

    def make_net(self) -> nn.Module:
        self.accuracy = MulticlassAccuracy(3)
        return nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"a": logits.mean(), "b": logits.std()})
        return {"loss": cross_entropy(logits, y)}


class WithDropout(Base):
    """Dropout, numpy's and Python's random numbers, a generator of its own."""

    def make_net(self) -> nn.Module:
        self.generator = torch.Generator().manual_seed(3)
        return nn.Sequential(nn.Linear(10, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3))

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        import random

        import numpy as np

        x, y = batch
        noise = torch.randn(x.shape, generator=self.generator).to(x) * (np.random.rand() + random.random())
        loss = cross_entropy(self(x + 0.1 * noise), y)
        self.log("train_loss", loss)
        return loss


class StatefulLSTM(Base):
    """Carries its hidden state, a list and a counter from batch to batch."""

    def make_net(self) -> nn.Module:
        self.hidden: Any = None
        self.history: list[float] = []
        self.seen = {"batches": 0}
        self.register_buffer("bank", torch.zeros(4, 8))
        self.head = nn.Linear(8, 3)
        return nn.LSTM(5, 8, batch_first=True)

    @override
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        x, y = batch
        if self.hidden is not None and self.hidden[0].shape[1] != len(x):
            self.hidden = None
        out, hidden = self.net(x.view(len(x), 2, 5), self.hidden)
        self.hidden = tuple(h.detach() for h in hidden)
        self.bank[self.seen["batches"] % 4] = out[:, -1].detach().mean(0)
        loss = cross_entropy(self.head(out[:, -1] + 0.1 * self.bank.mean(0)), y)
        self.history.append(float(loss.detach()))
        self.seen["batches"] += 1
        self.log("train_loss", loss, on_epoch=True)
        return loss


class EditsItsBatch(Base):
    """Normalises its batch in place, which is fine as long as nobody hands out the same batch twice."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch[0].mul_(0.5).add_(0.1)
        return super().training_step(batch, batch_idx)


class WithAverage(Base):
    """Keeps an exponential average of its weights through `.data`, which no version counter shows."""

    def make_net(self) -> nn.Module:
        net = super().make_net()
        self.average = super().make_net().requires_grad_(False)
        self.average.load_state_dict(net.state_dict())
        return net

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for mean, weight in zip(self.average.parameters(), self.net.parameters(), strict=True):
            mean.data.mul_(0.9).add_(weight.data, alpha=0.1)
        x, y = batch
        loss = cross_entropy(self(x) + 0.1 * self.average(x), y).reshape(1)
        self.log("train_loss", loss)
        return loss


MODULES = [Base, WithBatchNorm, WithDropout, StatefulLSTM, EditsItsBatch, WithAverage]


class Recorder(Callback):
    """Writes down every logged value of every batch, and which hooks ran."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []
        self.backwards = 0

    @override
    def on_before_backward(self, *_: Any) -> None:
        self.backwards += 1

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        names = {n: v for n, v in trainer.callback_metrics.items() if not n.startswith(("hamu/", "forget/", "retain/"))}
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = {} if scaler is None else {"scale": scaler.get_scale()}
        self.values.append({name: float(value) for name, value in names.items()} | scale)


def make_data(n: int = 96, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 10, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def fit(module: LightningModule, *callbacks: Callback, seed: int = 1, **settings: Any) -> tuple[Trainer, Recorder]:
    """Fit for two epochs on shuffled data; `workers` goes to the loader, `ckpt_path` to `Trainer.fit`."""
    if settings.get("precision") == "16-mixed":
        del settings["precision"]  # with it Lightning would take bfloat16 on the CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
        settings["plugins"] = [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]
    seed_everything(seed, verbose=False)
    recorder, workers = Recorder(), settings.pop("workers", 0)
    loader, ckpt_path = settings.pop("loader", None), settings.pop("ckpt_path", None)
    if loader is None:
        loader = DataLoader(make_data(), batch_size=16, shuffle=True, num_workers=workers)
    options: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        # Logging takes a third of a long fit's time.
        "log_every_n_steps": 2 if settings.get("max_epochs", 2) in range(1, 10) else 10,
    }
    trainer = Trainer(**{**options, **settings}, callbacks=[*callbacks, recorder])
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer, recorder


def build(kind: type[Base], optimizer: str = "sgd", seed: int = 5) -> Base:
    torch.manual_seed(seed)
    module = kind()
    module.optimizer = optimizer
    return module


def trained_on(data: TensorDataset, steps: int, kind: type[Base] = Base, lr: float = 0.02) -> Base:
    """A module that remembers data; each call gives a copy of its own."""
    return copy.deepcopy(_train_on(data, steps, kind, lr))


@cache
def _train_on(data: TensorDataset, steps: int, kind: type[Base], lr: float) -> Base:
    module = build(kind)
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    x, y = data.tensors
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(module(x), y).backward()
        optimizer.step()
    return module
