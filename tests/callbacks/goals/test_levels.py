"""Levels are those of the model in evaluation mode, whatever dropout and BatchNorm do in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, Holdout
from hamu_lightning.objectives import evaluating
from hamu_lightning.rules import RelativeRadius, TargetQuota
from tests.callbacks.goals.test_targets import FORGET, HELD_OUT, loss_on, trained
from tests.callbacks.modules import Base, WithBatchNorm, build, fit


class Dropped(Base):
    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


class OnlyInTraining(Base):
    """Gives no loss in evaluation mode, as detectors do."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.training:
            raise KeyError("loss_classifier")
        return super().training_step(batch, batch_idx)


def levels_of(module: Base, **options: Any) -> list[tuple[float, float]]:
    """What a target measures, and what it should be."""
    seen: list[tuple[float, float]] = []

    class Spy(Holdout):
        @override
        def measure(self, module: Any, mean_loss: Any, batch: Any) -> Any:
            with evaluating(module):
                expected = loss_on(module, HELD_OUT)
            seen.append((float(super().measure(module, mean_loss, batch)), expected))
            return 50.0

    rule = HAMUQ(TargetQuota(Spy(HELD_OUT, every=1)), radius=RelativeRadius(0.02))
    with pytest.warns(UserWarning, match="The fit has ended before the target"):
        fit(module, HAMUCallback(DataLoader(FORGET, batch_size=20), rule), max_steps=3, **options)
    return seen


@pytest.mark.parametrize("kind", [Dropped, WithBatchNorm])
def test_the_target_is_measured_in_evaluation_mode(kind: type[Base]) -> None:
    module = trained(kind)
    for level, expected in levels_of(module):
        assert level == pytest.approx(expected, rel=1e-6)  # float32


def test_a_module_that_gives_no_loss_in_evaluation_mode_is_measured_in_its_own() -> None:
    with pytest.warns(UserWarning, match="in evaluation mode its step raised KeyError"):
        assert len(levels_of(build(OnlyInTraining))) >= 3


def test_modes_are_put_back() -> None:
    module = trained(Dropped)
    modes = []
    module.net[2].register_forward_pre_hook(lambda part, _: modes.append(part.training))
    levels_of(module)
    assert set(modes) == {False, True} and module.net[2].training


def test_the_forget_level_is_measured_in_evaluation_mode() -> None:
    module = trained(Dropped)
    rule = HAMUQ(TargetQuota(50.0), radius=RelativeRadius(0.02))
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=20), rule)
    with pytest.warns(UserWarning, match="The fit has ended before the target: forget loss") as caught:
        fit(module, hamu, max_steps=3)
    with evaluating(module):
        assert f"forget loss {loss_on(module, FORGET):.4g} for" in str(caught[-1].message)
    assert torch.isfinite(next(module.parameters())).all()
