"""Windows of several micro-batches: both gradients are means over the window, whatever its length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.rules import FixedRadius, LearningRateRadius, RelativeRadius, Rule
from tests.callbacks.modules import Base, build, fit, make_data

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]
RADII = [LearningRateRadius(), FixedRadius(0.01), RelativeRadius(0.02)]


class Linear(Base):
    """Its gradient is the mean of the batch everywhere. Batches `skipped` give no loss, `cut` ends the epoch."""

    skipped: tuple[int, ...] = ()
    cut: int | None = None

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx in self.skipped and len(batch[0]) == 4:
            return None
        return (batch[0] @ self.weight).mean()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if batch_idx == self.cut else None

    def make_net(self) -> torch.nn.Module:
        self.weight = torch.nn.Parameter(torch.ones(10))
        return torch.nn.Identity()


class Gramians(Callback):
    """Writes down the Gramian of each step."""

    def __init__(self, hamu: HAMUCallback) -> None:
        self.hamu, self.seen = hamu, []  # type: ignore[var-annotated]

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        step = self.hamu.last_step
        if step is not None and all(step.gramian is not other for other in self.seen):
            self.seen.append(step.gramian)


def batches(size: int, seed: int) -> list[Tensor]:
    return list(make_data(size * 8, seed).tensors[0].split(size))


def loader(parts: list[Tensor]) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.cat(parts), torch.zeros(sum(map(len, parts)))), batch_size=len(parts[0]))


RETAIN, FORGET = batches(4, seed=1), batches(6, seed=2)
# Settings, and for each step the retain and the forget batches in its window.
WINDOWS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "one by one": ({"accumulate_grad_batches": 1, "max_steps": 3}, [("0", "0"), ("1", "1"), ("2", "2")]),
    "short last window": ({}, [("012", "012"), ("345", "345"), ("67", "67")]),
    "last batch alone": ({"limit_train_batches": 4}, [("012", "012"), ("3", "3")]),
    "no loss at the end": ({"skipped": (2,), "max_steps": 2}, [("01", "012"), ("345", "345")]),
    "no loss in a short window": ({"skipped": (0, 7)}, [("12", "012"), ("345", "345"), ("6", "67")]),
    "no loss in a whole window": ({"skipped": (3, 4, 5)}, [("012", "012"), ("67", "67")]),
    # The third epoch begins with forget batch 0 again: each of the first two has taken four.
    "cut by the module": ({"cut": 4, "max_epochs": 3}, [("012", "012"), ("012", "456"), ("012", "012")]),
    "cut by max_steps": ({"max_steps": 1}, [("012", "012")]),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_gradients_are_means_over_the_window(name: str) -> None:
    settings, windows = WINDOWS[name]
    settings = {"max_epochs": 1, "accumulate_grad_batches": 3, **settings}
    module = build(Linear)
    module.skipped, module.cut = settings.pop("skipped", ()), settings.pop("cut", None)
    callback = HAMUCallback(loader(FORGET), HAMUQ(1e-4, radius=FixedRadius(1e-3)))
    gramians = Gramians(callback)
    fit(module, callback, gramians, loader=loader(RETAIN), **settings)
    expected = []
    for retain, forget in windows:
        means = [
            torch.stack([parts[int(i)].mean(0) for i in row]).mean(0)
            for parts, row in ((RETAIN, retain), (FORGET, forget))
        ]
        rows = torch.stack(means).double()
        expected.append(rows @ rows.T)
    torch.testing.assert_close(torch.cat(gramians.seen), torch.stack(expected), rtol=1e-5, atol=1e-7)  # float32 sums


def train(accumulation: int, rule: Rule, n: int = 120, **settings: Any) -> tuple[Base, HAMUCallback]:
    """Retain batches of 24, forget batches of 12, or a third of that three times; 5 steps an epoch."""
    module = build(Base, settings.pop("optimizer", "sgd")).double()
    x, y = make_data(n).tensors
    x_forget, y_forget = make_data(n // 2, seed=9).tensors
    callback = HAMUCallback(DataLoader(TensorDataset(x_forget.double(), y_forget), batch_size=12 // accumulation), rule)
    retain = DataLoader(TensorDataset(x.double(), y), batch_size=24 // accumulation)
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulation, **settings}
    fit(module, callback, loader=retain, **options)
    return module, callback


@pytest.mark.filterwarnings("ignore:The base optimizer")
@pytest.mark.parametrize("radius", RADII, ids=repr)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_accumulation_is_the_joint_batch(radius: Any, optimizer: str) -> None:
    rule = HAMUQ(1e-3, radius=radius)
    (joint, first), (accumulated, second) = (train(n, rule, optimizer=optimizer) for n in (1, 3))
    assert first.combined_steps == second.combined_steps == 10
    for a, b in zip(joint.parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)  # float64 sums in another order, over 10 steps


@pytest.mark.parametrize("radius", RADII, ids=repr)
def test_a_short_window_steps_as_its_joint_batch(radius: Any) -> None:
    """104 samples in batches of 8 make four windows of 3 and a last one of 1; jointly 24, 24, 24, 24 and 8."""
    (joint, _), (accumulated, second) = (train(n, HAMUQ(1e-3, radius=radius), 104, max_epochs=1) for n in (1, 3))
    assert second.combined_steps == 5
    assert second.last_step is not None
    torch.testing.assert_close(second.last_step.coefficients.total_quota, torch.tensor(1e-3).double())
    # The forget batches: 52 samples make 12, 12, 12, 12, 4 and 4, 4, 4 | ... | 4: the same windows.
    for a, b in zip(joint.parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
