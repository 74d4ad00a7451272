"""The loss of each sample of modules of all kinds, against the formula, one sample after the other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from hamu_lightning.evidence import evaluate
from tests.callbacks.modules import Base, build


class Segmenter(Base):
    def make_net(self) -> nn.Module:
        return nn.Conv2d(1, 3, 1)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])


class Tokens(Base):
    """Logits `[N, T, V]`; the mean over all places, some of which have no label."""

    def make_net(self) -> nn.Module:
        return nn.Embedding(7, 7)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())


class Binary(Base):
    def make_net(self) -> nn.Module:
        return nn.Linear(4, 1)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1].float())


class Regression(Binary):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.mse_loss(self(batch[0]), batch[1])


class Smoothed(Base):
    """The mean of a loss that is none of the usual ones."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1) + 0.5


def make_parts() -> dict[str, tuple[type[Base], tuple[Tensor, Tensor], Any]]:
    random = torch.Generator().manual_seed(0)
    classes = torch.randint(3, (6, 4, 4), generator=random)
    tokens = torch.randint(7, (6, 5), generator=random)
    labels = torch.randint(7, (6, 5), generator=random)
    labels[2, 1:] = labels[4, 0] = -100
    x = torch.randn(6, 4, generator=random)
    return {
        "segmentation": (
            Segmenter,
            (torch.randn(6, 1, 4, 4, generator=random), classes),
            lambda o, y: (F.cross_entropy(o, y), (o.argmax(1) == y).double().mean()),
        ),
        "tokens": (
            Tokens,
            (tokens, labels),
            lambda o, y: (F.cross_entropy(o[0], y[0]), (o.argmax(2) == y)[y != -100].double().mean()),
        ),
        "binary": (
            Binary,
            (x, torch.tensor([0, 1, 1, 0, 1, 0])),
            lambda o, y: (
                F.binary_cross_entropy_with_logits(o[:, 0], y.double()),
                ((o[:, 0] > 0) == y).double().mean(),
            ),
        ),
        "regression": (Regression, (x, x[:, :1] * 2), lambda o, y: (F.mse_loss(o, y), torch.tensor(math.nan))),
        "one by one": (
            Smoothed,
            (torch.randn(6, 10, generator=random), torch.tensor([0, 1, 2, 0, 1, 2])),
            lambda o, y: (F.cross_entropy(o, y, label_smoothing=0.1) + 0.5, (o.argmax(1) == y).double().mean()),
        ),
    }


@pytest.mark.parametrize("name", make_parts())
def test_other_kinds_of_modules(name: str) -> None:
    kind, tensors, oracle = make_parts()[name]
    module = build(kind)
    part = evaluate(module, {"forget": DataLoader(TensorDataset(*tensors), batch_size=4)}).parts["forget"]
    for i in range(6):
        loss, recognised = oracle(module(tensors[0][i : i + 1]).detach().double(), tensors[1][i : i + 1])
        assert float(part.losses[i]) == pytest.approx(float(loss), abs=1e-6)
        assert float(part.recognised[i]) == pytest.approx(float(recognised), nan_ok=True)
    assert (part.log_probs is None) == (name != "one by one")


def test_losses_of_sure_samples_keep_their_order() -> None:
    module = build(Base)
    module.net = nn.Identity()  # type: ignore[assignment]
    x = torch.zeros(3, 3)
    x[:, 0] = torch.tensor([20.0, 25.0, 30.0])
    found = evaluate(module, {"forget": TensorDataset(x, torch.zeros(3, dtype=torch.long))}).parts["forget"].losses
    assert found.tolist() == pytest.approx([2 * math.exp(-z) for z in (20, 25, 30)], rel=1e-6)  # 0 in float32
