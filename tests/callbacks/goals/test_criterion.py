"""What is raised gives the direction; when it is enough says the module's own loss."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from hamu_lightning import Chance, HAMUCallback, Holdout
from hamu_lightning.callbacks import ByObjective, ForgetAbove, RetainAbove, StopReason
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.objectives import NPO, CrossEntropy, LossCap, Objective
from hamu_lightning.optim import Aim, Exchange
from hamu_lightning.rules import HAMUQ, RelativeQuota, RelativeRadius, TargetQuota
from tests.callbacks.goals.test_targets import FORGET, HELD_OUT, loss_on, trained
from tests.callbacks.modules import Base, fit


def reach(module: Base, target: Any, objective: Objective, **options: Any) -> HAMUCallback:
    rule = HAMUQ(TargetQuota(target), radius=RelativeRadius(0.02))
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=20, shuffle=True), rule, objective=objective, verify=True)
    fit(module, hamu, **{"max_epochs": 20, **options})
    return hamu


class Tripled(CrossEntropy):
    """In another unit than the loss."""

    @override
    def samples(self, batch: Any) -> Tensor:
        return 3 * super().samples(batch)


@pytest.mark.parametrize(("objective", "target"), [(NPO(0.5), 0.7), (Tripled(), Holdout(HELD_OUT))])
def test_whatever_is_raised_the_loss_says_when_it_is_enough(objective: Objective, target: Any) -> None:
    """NPO is at most 0, and one that is three times the loss would be there at a third of it."""
    module = trained()
    hamu = reach(module, target, objective)
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    level, aim = map(float, re.findall(r"forget loss ([\d.]+) for a target of ([\d.]+\d)", hamu.stop_message or "")[0])
    assert level == pytest.approx(loss_on(module, FORGET), rel=1e-3) and 0.95 * aim <= level < 1.2 * aim
    table = hamu.forgotten_samples["forget"]
    assert float(table.loss_after.mean()) == pytest.approx(loss_on(module, FORGET), rel=1e-4)


def test_the_unit_of_the_objective_is_there_for_those_who_ask() -> None:
    module = trained()
    hamu = reach(module, ByObjective(1.5), Tripled())
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    assert loss_on(module, FORGET) == pytest.approx(0.5, rel=0.15)
    assert hamu.stop_message is not None and hamu.stop_message.startswith("objective")
    assert ByObjective(Holdout(HELD_OUT, every=3)).every == 3 and ByObjective(Holdout(HELD_OUT)).has_held_out
    assert float(ByObjective(Chance(2)).measure(torch.nn.Identity(), torch.mean, None)) == pytest.approx(
        0.693, abs=1e-3
    )
    with pytest.raises(HAMUValueError, match="in another unit than the objective's"):
        ByObjective(ByObjective(1.0))


class Stream(IterableDataset[Any]):
    def __init__(self) -> None:
        self.source = (i for i in range(0))  # cannot be copied, nor read beside the fit

    def __iter__(self) -> Any:
        yield from zip(*FORGET.tensors, strict=True)


def test_a_set_that_cannot_be_read_again_is_judged_by_the_loss_too() -> None:
    module = trained()
    rule = HAMUQ(TargetQuota(0.45), radius=RelativeRadius(0.05))
    with pytest.warns(UserWarning, match="judged by the mean loss over a whole pass"):
        hamu = HAMUCallback(DataLoader(Stream(), batch_size=20), rule, objective=NPO(0.5))
        fit(module, hamu, max_epochs=20)
    assert hamu.stop_reason is StopReason.TARGET_REACHED and loss_on(module, FORGET) > 0.75 * 0.45


class ForTheObjectiveAlone(Base):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(batch[0]) == 20:
            raise KeyError("weights")
        return super().training_step(batch, batch_idx)


def test_a_loss_that_cannot_be_measured_is_told_of() -> None:
    with pytest.raises(HAMUStateError, match="raised KeyError: 'weights'. ByObjective\\(target\\) judges by"):
        reach(trained(ForTheObjectiveAlone), 0.7, CrossEntropy())
    hamu = reach(trained(ForTheObjectiveAlone), ByObjective(0.7), LossCap(CrossEntropy(), 3.0))
    assert hamu.stop_reason is StopReason.TARGET_REACHED


def test_what_is_asked_is_exchanged_at_the_measured_rate() -> None:
    exchange = Exchange()
    aim, quota = Aim(target=torch.tensor(2.0), steps=10, exchange=exchange), TargetQuota(2.0)
    aim.mark(torch.tensor(1.0))
    assert float(aim.resolve(quota)) == torch.inf  # as much as the trust region allows
    aim.advance(torch.tensor(0.2))
    assert float(aim.level) == 1.0  # type: ignore[arg-type]
    aim.mark(torch.tensor(1.1))  # half of what was raised has come to the loss
    assert float(aim.resolve(quota)) == pytest.approx(0.9 / 9 / 0.5)
    aim.advance(torch.tensor(0.2))
    assert float(aim.level) == pytest.approx(1.2)  # type: ignore[arg-type]
    again = Aim()
    again.load_state_dict(aim.state_dict())
    aim.mark(torch.tensor(1.0), learns=False)
    assert float(aim.resolve(quota)) == pytest.approx(1.0 / 8 / 0.5)
    again.mark(torch.tensor(1.05))  # it falls while something is raised: no rate
    assert float(again.resolve(quota)) == torch.inf
    again.mark(torch.tensor(2.5))
    assert float(again.resolve(quota)) == 0.0


@pytest.mark.parametrize(("by_objective", "level"), [(False, 0.5), (True, 0.5 / 3)])
def test_a_ceiling_is_for_the_loss_too(by_objective: bool, level: float) -> None:
    module, ceiling = trained(), ForgetAbove(0.5, patience=1, by_objective=by_objective)
    loader, rule = DataLoader(FORGET, batch_size=40), HAMUQ(RelativeQuota(0.5), radius=RelativeRadius(0.01))
    hamu = HAMUCallback(loader, rule, objective=Tripled(), stop_on=[ceiling])
    fit(module, hamu, max_epochs=20)
    assert hamu.stop_reason is StopReason.FORGET_CEILING
    assert 0.5 * level < loss_on(module, FORGET) <= level


def test_a_ceiling_of_the_retain_loss_is_for_the_loss() -> None:
    module, rule = trained(), HAMUQ(RelativeQuota(0.5), radius=RelativeRadius(0.01))
    loader = DataLoader(FORGET, batch_size=40)
    hamu = HAMUCallback(loader, rule, retain_objective=Tripled(), stop_on=[RetainAbove(3.0)])
    fit(module, hamu, max_steps=3)
    assert hamu.stop_reason is None  # three times the loss is above it
    with pytest.raises(HAMUValueError, match="Expected ceilings of one unit"):
        HAMUCallback(loader, rule, stop_on=[RetainAbove(3.0), RetainAbove(2.0, by_objective=True)])
