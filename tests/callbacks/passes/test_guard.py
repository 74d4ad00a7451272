"""What a pass leaves as it was, kind by kind: odd tensors, arrays, objects, loggers; and at what price."""

from __future__ import annotations

import queue
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hamu_lightning import HAMUCallback
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.callbacks.passes import ModuleGuard
from hamu_lightning.callbacks.passes._saved import HUGE, SMALL
from hamu_lightning.rules import FineTune
from tests.callbacks.modules import Base, build, fit
from tests.callbacks.setups import forget_data

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:Sparse")


def read_only() -> Any:
    array = np.arange(6.0)
    array.flags.writeable = False
    return array


class Limited(deque[Any]):
    def __init__(self, first: Any) -> None:
        super().__init__([first], maxlen=3)


class Slots:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class Unreadable:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


class Frame:
    """What the guard asks of a table of pandas, which is no dependency here; the contents are not in an attribute."""

    size = 2

    def __init__(self, rows: list[int]) -> None:
        self._mgr = np.array(rows)

    def copy(self) -> Frame:
        return Frame(self._mgr.tolist())

    def equals(self, other: Frame) -> bool:
        return np.array_equal(self._mgr, other._mgr)


Frame.__module__ = "pandas.core.frame"

KEPT: dict[str, Any] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "expanded": lambda: torch.ones(1).expand(3),
    "large expanded": lambda: torch.ones(1).expand(2 * SMALL),
    "not initialised": lambda: nn.LazyLinear(3),
    "meta": lambda: torch.empty(3, device="meta"),
    "read-only array": read_only,
    "tensor of a read-only array": lambda: torch.from_numpy(read_only().copy()).expand(2, 6),
    "objects": lambda: np.array([{}, 1], dtype=object),
    "unreadable": Unreadable,
    "unreadable in a list": lambda: [Unreadable()],
}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_saved_in_the_usual_way_ends_no_pass(name: str, recwarn: Any) -> None:
    module = nn.Linear(2, 2)
    module.odd = KEPT[name]()
    with ModuleGuard(module).guarding():
        pass
    assert not [warning for warning in recwarn if "forget pass" in str(warning.message)]


CHANGED: dict[str, tuple[Any, Any, Any]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), lambda x: x.mul_(3), lambda x: float(x.to_dense().sum())),
    "expanded": (lambda: torch.ones(1).expand(3), lambda x: x[:1].mul_(3), lambda x: x.tolist()),
    "resized": (lambda: torch.ones(0), lambda x: x.resize_(4), lambda x: x.shape),
    "replaced": (lambda: torch.ones(2), lambda x: setattr(x, "data", torch.zeros(3)), lambda x: x.tolist()),
    "large replaced": (
        lambda: torch.ones(2 * SMALL),
        lambda x: setattr(x, "data", torch.zeros(3)),
        lambda x: float(x.sum()),
    ),
    "array": (lambda: np.ones(3), lambda x: x.__setitem__(0, 7), lambda x: x.tolist()),
    "large array": (lambda: np.ones(2 * SMALL), lambda x: x.__setitem__(-1, 7), lambda x: float(x.sum())),
    "deque": (lambda: Limited(1), lambda x: x.append(2), list),
    "slots": (Slots, lambda x: setattr(x, "n", 2), lambda x: x.n),
    "queue": (queue.Queue, lambda x: x.put(1), lambda x: x.qsize()),
    "bytes": (lambda: bytearray(b"ab"), lambda x: x.__setitem__(0, 7), bytes),
    "frame": (lambda: Frame([1, 2]), lambda x: x._mgr.__setitem__(0, 7), lambda x: x._mgr.tolist()),
}


@pytest.mark.parametrize("name", CHANGED)
def test_changes_are_undone(name: str) -> None:
    make, change, read = CHANGED[name]
    module = nn.Linear(2, 2)
    module.odd = odd = make()
    before = read(odd)
    with ModuleGuard(module).guarding():
        change(odd)
        assert read(odd) != before
    assert module.odd is odd
    assert read(odd) == before


class CountsOnTrainer(Base):
    """Keeps a count on the trainer, and ends the fit at a loss that no retain batch has."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        trainer: Any = self.trainer
        trainer.count = getattr(trainer, "count", 0) + 1
        if len(batch[0]) == 8:
            trainer.should_stop = trainer.is_forget = True
        return super().training_step(batch, batch_idx)


def test_names_on_the_trainer_are_those_of_the_retain_stream() -> None:
    trainer, _ = fit(build(CountsOnTrainer), HAMUCallback(DataLoader(forget_data(), 8), FineTune()))
    assert trainer.count == trainer.global_step == 12  # type: ignore[attr-defined]
    assert not hasattr(trainer, "is_forget")


def rest(guard: ModuleGuard) -> None:
    """The first windows, in which all is looked at."""
    for _ in range(3):
        with guard.guarding():
            pass
        guard.end_window()


def count_copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    to = Tensor.to

    def counting(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("copy"):
            sizes.append(self.numel())
        return to(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", counting)
    return sizes


def test_what_is_large_is_copied_at_looks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(2, 2)
    module.teacher = nn.Linear(300, 300, bias=False).requires_grad_(False)
    guard, copies = ModuleGuard(module), count_copies(monkeypatch)
    rest(guard)
    assert copies.count(90_000) == 3
    with guard.guarding():
        pass
    assert copies.count(90_000) == 3
    guard.look_again()
    before = module.teacher.weight.detach().clone()
    with guard.guarding():  # an average that begins in a later epoch, written past the version counter
        module.teacher.weight.data.add_(1)
    assert copies.count(90_000) == 4
    assert torch.equal(module.teacher.weight, before)
    guard.end_window()
    with guard.guarding():  # from now on it is saved, where it is
        module.teacher.weight.data.add_(1)
    assert copies.count(90_000) == 4
    assert torch.equal(module.teacher.weight, before)


def test_what_starts_to_change_between_looks_is_noticed() -> None:
    module = nn.Linear(2, 2)
    module.late = torch.ones(70_000)
    guard = ModuleGuard(module)
    rest(guard)
    with pytest.warns(UserWarning, match=r"changed a tensor of shape \[70000\]"), guard.guarding():
        module.late.add_(1)


def test_a_huge_frozen_tensor_is_copied_only_where_a_trained_one_has_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(2, 2)
    module.teacher = nn.Parameter(torch.zeros(HUGE + 1), requires_grad=False)
    copies = count_copies(monkeypatch)
    with ModuleGuard(module).guarding():
        pass
    assert HUGE + 1 not in copies
    module.average = nn.Parameter(torch.zeros(HUGE + 1))
    with ModuleGuard(module).guarding():
        module.teacher.data.add_(1)
    assert HUGE + 1 in copies
    assert not module.teacher.any()


def test_arrays_that_are_files_are_not_read(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    module.table = np.lib.format.open_memmap(tmp_path / "table.npy", mode="w+", shape=(2 * SMALL,))
    guard = ModuleGuard(module)
    with guard.guarding():
        pass
    with pytest.warns(UserWarning, match="changed an array"), guard.guarding():
        module.table[:] = 1
    assert module.table.all()


class Memory(Logger):
    """Keeps what is written; is its own experiment."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []

    @property
    def experiment(self) -> Any:
        return self

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows += [(step, dict(metrics))] if "direct" in metrics else []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.rows.append((name, value, step))


class Writes(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert isinstance(self.logger, Memory)
        assert self.logger.name == "memory"
        self.logger.experiment.add_scalar("mean", float(batch[0].mean()), self.global_step)
        self.logger.log_metrics({"direct": float(batch[0].mean())}, step=self.global_step)
        for name, reduction in (("most", "max"), ("rows", "sum")):
            self.log(name, batch[0][:, 0].abs().max(), reduce_fx=reduction, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_loggers_are_silent_in_passes_and_reductions_kept() -> None:
    plain, ours = Memory(), Memory()
    fit(build(Writes), logger=plain, max_epochs=1)
    callback = HAMUCallback(forget_data(), FineTune(), passes=PassOptions(batchnorm="retain"))
    trainer, _ = fit(build(Writes), callback, logger=ours, max_epochs=1, limit_train_batches=3)
    assert len(ours.rows) == 6
    assert ours.rows == plain.rows[:6]
    forgotten = forget_data().tensors[0][:, 0].abs()  # 40 rows in batches of 16: all of them
    assert float(trainer.callback_metrics["forget/most"]) == float(forgotten.max())
    assert float(trainer.callback_metrics["forget/rows"]) > float(forgotten.max())
