"""What measuring costs: batches that go through the module besides those of the steps."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUCallback, VerifySteps
from hamu_lightning.callbacks.goals._forget_level import ForgetLevel
from hamu_lightning.optim import Aim
from hamu_lightning.rules import HAMUQ, RelativeRadius, TargetQuota
from tests.callbacks.modules import Base, fit, make_data, trained_on

DATA = make_data(320, seed=9)


class Counting(Base):
    calls = 0

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        Counting.calls += 1  # not on the module, which is put back after each pass
        return super().training_step(batch, batch_idx)


class Counts(L.Callback):
    """How many batches had gone through the module at the end of each step, and at the end of the fit."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.rows.append(Counting.calls)


def count(target: Any, steps: int, **options: Any) -> tuple[list[int], HAMUCallback]:
    module, counts = trained_on(DATA, 100, Counting), Counts()
    Counting.calls = 0
    rule = HAMUQ(TargetQuota(target, steps=60), radius=RelativeRadius(0.01))
    hamu = HAMUCallback(DataLoader(DATA, batch_size=8, shuffle=True), rule, **options)
    fit(module, hamu, counts, max_epochs=-1, max_steps=steps)
    return [after - before for before, after in zip(counts.rows, counts.rows[1:], strict=False)], hamu


@pytest.mark.filterwarnings("ignore:The fit has ended before the target", "ignore:The target should be reached in 60")
def test_far_from_the_end_four_batches_are_read_every_ten_steps() -> None:
    """Of 40; a forget and a retain batch are those of the step."""
    steps, _ = count(50.0, 22)
    assert steps == [2] * 9 + [6] + [2] * 9 + [6] + [2]


@pytest.mark.filterwarnings("ignore:The fit has ended before the target", "ignore:The target should be reached in 60")
@pytest.mark.parametrize(("verify", "far", "near"), [(True, 4.4, 6.5), (VerifySteps(every="auto"), 3.3, 5.0)], ids=str)
def test_batches_that_go_through_the_module_in_a_step(verify: Any, far: float, near: float) -> None:
    """Of a set of 40: a forget and a retain batch, those that are verified, and those that tell the level."""
    steps, hamu = count(0.8, 100, verify=verify)
    middle = len(steps) // 2
    assert sum(steps[:middle]) / middle <= far
    assert sum(steps[middle:]) / (len(steps) - middle) <= near
    assert hamu.combined_steps >= 0.8 * len(steps)


class Readings:
    """In the place of a gauge and of a pass: levels of a set of 40 batches, which rise by `rise`."""

    def __init__(self) -> None:
        self.heights = torch.linspace(0.0, 2.0, 40, dtype=torch.float64)
        self.rise, self.read = torch.zeros(40, dtype=torch.float64), []
        self.batch_losses: Any = None
        self.length = 40

    def batches(self, most: int | None = None, numbers: Any = None) -> Any:
        yield from range(40) if numbers is None else numbers

    def mean_loss(self, batches: Any, *_: Any) -> Any:
        numbers = [*range(40)] if batches is self else [*batches]
        self.read.append(len(numbers))
        losses = (self.heights + self.rise)[numbers]
        self.batch_losses = losses, torch.ones_like(losses)
        return losses.mean()

    def measure_pair(self, level: Any, *_: Any) -> Any:
        return level(None, self.mean_loss, None).unbind()


def test_a_few_batches_say_how_far_a_set_is() -> None:
    """Their changes, and not their height, which is another one in each batch."""
    data: Any = Readings()
    level = ForgetLevel(data, data, data, {})
    end = torch.tensor(1.9)
    assert float(level.measure(end)) == pytest.approx(1.0, abs=0.01) and data.read == [32]
    data.rise += 0.5
    assert float(level.measure(end)) == pytest.approx(1.5, abs=0.01) and data.read == [32, 4]
    assert level.value is None
    data.rise += 0.5  # at the end: the base, and then the whole set
    assert float(level.measure(end)) == pytest.approx(2.0) and data.read == [32, 4, 4, 32, 40]
    assert level.value is not None
    data.rise[::2] -= 1.0  # changes that differ: more is read before it is believed
    level.measure(end)
    assert data.read[-2:] == [4, 32]


def test_it_is_measured_where_it_could_have_come_to_the_end() -> None:
    data: Any = Readings()
    level, aim, end = ForgetLevel(data, data, data, {}), Aim(), torch.tensor(2.0)
    assert level.is_due(aim, end)
    aim.mark(torch.tensor(1.0))
    aim.taken = 1
    level.mark(torch.tensor(1.0), end, 1)
    aim.level = torch.tensor(1.4)
    assert not level.is_due(aim, end)
    aim.level = torch.tensor(1.46)  # twice the promise would be beyond 1.9
    assert level.is_due(aim, end)
    aim.level = torch.tensor(1.0)
    assert not level.is_due(aim, end)
    for loss in (0.1, 0.1, 3.0, 3.0):
        level.trail.add(torch.tensor(loss))
    assert level.is_due(aim, end)
    aim.taken = 10
    level.start_over()
    assert level.is_due(aim, end)
