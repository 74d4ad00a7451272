"""The models and the data that a step is measured on: random numbers, since only the shapes count."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

Batch = tuple[Tensor, Tensor]


class Transformer(nn.Module):
    """A language model: 24.4 million weights in 145 tensors by default."""

    def __init__(self, width: int = 384, layers: int = 12, tokens: int = 8000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[N, L]` to logits `[N * L, tokens]`."""
        logits: Tensor = self.head(self.layers(self.embedding(tokens))).flatten(0, 1)
        return logits


class Adapters(nn.Module):
    """448 tensors of LoRA's size, 16 x 512, in pairs that map 512 numbers to 512 through 16."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ParameterList(nn.Parameter(torch.randn(16, 512) * 0.02) for _ in range(448))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, 512]` to `[N, 512]`."""
        for down, up in zip(self.pairs[::2], self.pairs[1::2], strict=True):
            x = x + (x @ down.t()) @ up
        return x


class Tiny(nn.Module):
    """2,000 tensors of 8 or 64 numbers, in 500 modules, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(Cell() for _ in range(500))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, 8]` to `[N, 10]`."""
        for cell in self.cells:
            x = cell(x)
        logits: Tensor = self.head(x)
        return logits


class Cell(nn.Module):
    """Four small tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) * 0.1)
        self.shift, self.bias = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, 8]` to `[N, 8]`."""
        return x + torch.tanh(x @ self.weight + self.shift) * self.scale * 0.1 + self.bias


@dataclass(frozen=True)
class Shape:
    """A model, and the batches that it is measured on.

    Args:
        make: Makes the model.
        batch: How many samples a batch has.
        inputs: The shape of a sample's input.
        classes: How many classes there are.
        steps: How many steps a short fit takes.
        is_text: Whether the input is tokens, each with a label.
    """

    make: Callable[[], nn.Module]
    batch: int
    inputs: tuple[int, ...]
    classes: int = 10
    steps: int = 40
    is_text: bool = False

    def data(self, batches: int, seed: int) -> TensorDataset:
        """Random samples for so many batches."""
        generator, n = torch.Generator().manual_seed(seed), batches * self.batch
        if self.is_text:
            inputs, labels = torch.randint(self.classes, (2, n, *self.inputs), generator=generator)
            return TensorDataset(inputs, labels)
        labels = torch.randint(self.classes, (n,), generator=generator)
        return TensorDataset(torch.randn(n, *self.inputs, generator=generator), labels)


def make_mlp() -> nn.Module:
    """Three layers."""
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def make_resnet20(in_channels: int) -> nn.Module:
    """The quickstart's ResNet-20; its BatchNorm rests, as it does in the callback."""
    from digits import make_resnet20

    return make_resnet20(in_channels=in_channels).eval()


SHAPES = {
    "mlp": Shape(make_mlp, 64, (8,), steps=100),
    "digits": Shape(lambda: make_resnet20(1), 64, (1, 8, 8), steps=30),
    "resnet20": Shape(lambda: make_resnet20(3), 64, (3, 32, 32), steps=11),
    "transformer": Shape(Transformer, 4, (64,), 8000, steps=8, is_text=True),
    "lora448": Shape(Adapters, 64, (512,), 512, steps=25),
    "tiny2000": Shape(Tiny, 64, (8,), steps=25),
}


def make_batches(shape: Shape) -> tuple[Batch, Batch]:
    """One batch to retain, and one to forget."""
    retain, forget = (shape.data(1, seed)[:] for seed in (1, 2))
    return (retain[0], retain[1]), (forget[0], forget[1])
