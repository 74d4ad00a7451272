"""Batches of any structure, and loaders of any kind: for both streams, without a trace."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUCallback
from hamu_lightning.callbacks import HAMUMisconfigurationError
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.rules import FineTune
from tests.callbacks.modules import Base, WithDropout, build, fit, make_data

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection"),
]

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    x: Tensor
    y: Tensor


class Encoding(UserDict[str, Any]):
    """Like the BatchEncoding of transformers: a dict that moves itself."""

    is_moved = False

    def to(self, device: Any, **_: Any) -> Encoding:
        self.data = {name: value.to(device) for name, value in self.data.items()}
        self.is_moved = True
        return self


class Graph:
    """Like the Data of PyG: an object that moves itself, and that says nothing of its size."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.is_moved = x, y, False

    def to(self, device: Any, **_: Any) -> Graph:
        self.x, self.y, self.is_moved = self.x.to(device), self.y.to(device), True
        return self


STRUCTURES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "namedtuple": Pair,
    "dict": lambda x, y: {"x": x, "y": y},
    "dataclass": Sample,
    "nested": lambda x, y: ({"x": [x]}, {"y": (y, "a note", None)}),
    "encoding": lambda x, y: Encoding(x=x, y=y),
    "graph": Graph,
}


def flatten(batch: Any) -> tuple[Tensor, Tensor]:
    """The two tensors of a batch; objects that move themselves must have been moved."""
    assert getattr(batch, "is_moved", True)
    if isinstance(batch, Encoding | dict):
        return batch["x"], batch["y"]
    if isinstance(batch, Graph | Sample):
        return batch.x, batch.y
    x, y = batch
    return (x["x"][0], y["y"][0]) if isinstance(x, dict) else (x, y)


class TakesAll(WithDropout):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict) and "retain" in batch:  # a paired loader without the callback
            batch = batch["retain"]
        x, y = flatten(batch)
        x.mul_(1.01)
        loss = cross_entropy(self(x), y)
        size = len(x) if isinstance(batch, Graph) else None  # the others tell it
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=size)
        return loss


def collate(structure: str, samples: list[Any]) -> Any:
    x, y = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return STRUCTURES[structure](x, y)


def assert_no_trace(
    loader: Callable[[], Any], forget: Any, kind: type[Base] = TakesAll, **settings: Any
) -> HAMUCallback:
    plain, paired = build(kind), build(kind)
    _, expected = fit(plain, loader=loader(), **settings)
    callback = HAMUCallback(forget, FineTune())
    _, recorded = fit(paired, callback, loader=loader(), **settings)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), paired.parameters(), strict=True))
    assert recorded.values == expected.values
    assert callback.forget_passes == len(expected.values)
    return callback


def loaders(mode: Any, n_retain: int = 96, n_forget: int = 40) -> CombinedLoader:
    sizes = {"retain": (n_retain, 0), "forget": (n_forget, 9)}
    return CombinedLoader(
        {name: DataLoader(make_data(n, seed), batch_size=16, shuffle=True) for name, (n, seed) in sizes.items()}, mode
    )


def flatten_anyway(batch: Any) -> Tensor:
    """A copy of the numbers of a batch that has not been moved."""
    if isinstance(batch, Encoding | Graph):
        return (batch["x"] if isinstance(batch, Encoding) else batch.x).clone()
    return flatten(batch)[0].clone()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("own", ["loader", "batches"])
def test_structures(structure: str, own: str) -> None:
    """As a loader, and as a list of batches that are handed out again and again to a module that edits them."""

    def make(data: TensorDataset) -> DataLoader[Any]:
        return DataLoader(data, batch_size=16, shuffle=True, collate_fn=partial(collate, structure))

    forget = make(make_data(40, seed=9))
    kept = list(forget)
    before = [flatten_anyway(batch) for batch in kept]
    assert_no_trace(lambda: make(make_data()), forget if own == "loader" else kept)
    assert all(torch.equal(a, flatten_anyway(b)) for a, b in zip(before, kept, strict=True))


class Endless(IterableDataset[Any]):
    """Samples without a length; not endless for that."""

    def __init__(self, n: int, seed: int) -> None:
        self.data = make_data(n, seed)

    def __iter__(self) -> Iterator[Any]:
        return iter([self.data[i] for i in torch.randperm(len(self.data)).tolist()])


@pytest.mark.parametrize("which", ["retain", "forget", "both"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_streams_without_length(which: str, accumulation: int) -> None:
    """Where the last window ends is seen only when the retain stream has ended."""
    retain = Endless(96, 0) if which != "forget" else make_data()
    forget = Endless(40, 9) if which != "retain" else make_data(40, 9)
    callback = assert_no_trace(
        lambda: DataLoader(retain, batch_size=16),
        DataLoader(forget, batch_size=16),
        accumulate_grad_batches=accumulation,
    )
    assert (callback.forget_passes, callback.combined_steps) == (12, {1: 12, 4: 4}[accumulation])


@pytest.mark.parametrize(
    ("mode", "n_retain", "n_forget", "steps"),
    [
        ("min_size", 96, 40, 6),
        ("min_size", 40, 96, 6),
        ("max_size", 96, 96, 12),
        ("max_size_cycle", 96, 40, 12),
        ("max_size_cycle", 40, 96, 12),
    ],
)
def test_combined_loader_of_both_streams(mode: str, n_retain: int, n_forget: int, steps: int) -> None:
    callback = assert_no_trace(lambda: loaders(mode, n_retain, n_forget), None)
    assert callback.combined_steps == steps


def test_combined_loader_whose_streams_end_apart() -> None:
    for sizes in ((96, 40), (40, 96)):
        with pytest.raises(HAMUStateError, match="one of them is missing.*mode='max_size_cycle'"):
            fit(build(TakesAll), HAMUCallback(rule=FineTune()), loader=loaders("max_size", *sizes))
    with pytest.raises(ValueError, match='does not support the `CombinedLoader.mode="sequential".'):
        fit(build(TakesAll), HAMUCallback(rule=FineTune()), loader=loaders("sequential"))


class TakesTwo(TakesAll):
    """Takes a batch of two named parts; from a sequential loader, one of them."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = [part for part in batch.values() if part is not None] if isinstance(batch, dict) else [batch]
        return sum(super(TakesTwo, self).training_step(part, batch_idx) for part in parts)  # type: ignore[return-value]


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle", "sequential"])
def test_combined_loader_as_an_ordinary_one(mode: Any) -> None:
    """Of the retain data in the modes that Lightning trains with, and of the forget data in all."""

    def combined(mode: Any, seed: int) -> CombinedLoader:
        parts = {"a": make_data(48, seed), "b": make_data(32, seed + 1)}
        return CombinedLoader({name: DataLoader(d, batch_size=16, shuffle=True) for name, d in parts.items()}, mode)

    retain_mode = "max_size_cycle" if mode == "sequential" else mode
    assert_no_trace(lambda: combined(retain_mode, 0), combined(mode, 7), TakesTwo)


@pytest.mark.parametrize("forget", [{"a": []}, [DataLoader(make_data()), DataLoader(make_data())]])
def test_collections_of_loaders_are_refused(forget: Any) -> None:
    with pytest.raises(HAMUMisconfigurationError, match="Several loaders become one by CombinedLoader"):
        fit(build(TakesAll), HAMUCallback(forget, FineTune()))


class GrowingData(LightningDataModule):
    """One more batch in each epoch; the forget data stay."""

    def __init__(self, is_paired: bool) -> None:
        super().__init__()
        self.is_paired, self.calls, self.forget_calls = is_paired, 0, 0

    @override
    def train_dataloader(self) -> Any:
        self.calls += 1
        n = 32 + 16 * self.trainer.current_epoch  # type: ignore[union-attr]
        return loaders("max_size_cycle", n, 16) if self.is_paired else DataLoader(make_data(n), batch_size=16)

    def forget_dataloader(self) -> Any:
        self.forget_calls += 1
        return None if self.is_paired else DataLoader(make_data(40, seed=9), batch_size=16, shuffle=True)


@pytest.mark.parametrize("is_paired", [True, False])
def test_reload_dataloaders_every_n_epochs(is_paired: bool) -> None:
    data = [GrowingData(is_paired), GrowingData(is_paired)]
    makes = iter(data)
    callback = assert_no_trace(lambda: next(makes), None, reload_dataloaders_every_n_epochs=1, max_epochs=3)
    assert callback.combined_steps == 2 + 3 + 4
    assert [(d.calls, d.forget_calls) for d in data] == [(3, 0), (3, 1)]
