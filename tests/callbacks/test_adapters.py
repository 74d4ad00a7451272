"""A fit with low-rank adapters: the default radius, the reference, a budget that is too small, weights at rest."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hamu_lightning import HAMUQ, Chance, HAMUCallback
from hamu_lightning.callbacks import StopReason
from hamu_lightning.callbacks.goals._planning import count_least
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.objectives import NPO, AdaptersDisabled
from hamu_lightning.rules import AdapterRadius, FixedRadius, RelativeRadius, TargetQuota
from hamu_lightning.solvers import FeasibleDirection
from tests.callbacks.modules import Base, fit, make_data, trained_on

FORGET = make_data(40, seed=9)


class Adapter(nn.Module):
    """A frozen layer with a fresh low-rank adapter beside it, as PEFT has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.scaling = base.requires_grad_(False), 2.0
        self.lora_A, self.lora_B = (
            nn.Linear(base.in_features, 4, bias=False),
            nn.Linear(4, base.out_features, bias=False),
        )
        nn.init.zeros_(self.lora_B.weight)
        self.is_on = True

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.scaling * self.is_on * self.lora_B(self.lora_A(x))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.is_on = False
        yield
        self.is_on = True

    def weight(self) -> Tensor:
        return (self.base_layer.weight + self.scaling * self.lora_B.weight @ self.lora_A.weight).detach()


def adapted() -> Base:
    """A module that knows what is to be forgotten, with a fresh adapter on its last layer."""
    module = trained_on(FORGET, 60, Base)
    torch.manual_seed(2)
    module.requires_grad_(False)
    module.net[2] = Adapter(module.net[2])
    return module


def callback(rule: Any = None, target: Any = None, **options: Any) -> HAMUCallback:
    return HAMUCallback(DataLoader(FORGET, batch_size=40), rule, target=target, **options)


def loss(module: Base) -> float:
    x, y = FORGET.tensors
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module(x), y))


def test_the_default_reaches_its_target_with_fresh_adapters() -> None:
    module, hamu = adapted(), callback(target=Chance())
    assert hamu.settings.rule == HAMUQ(TargetQuota(Chance()), radius=RelativeRadius(2e-3), blocks="global")
    before = loss(module)
    fit(module, hamu, max_epochs=-1, max_steps=60)
    assert hamu.settings.rule is not None
    assert isinstance(hamu.settings.rule, HAMUQ)
    assert hamu.settings.rule.radius == AdapterRadius(5e-2)
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    assert before < 0.3 < 0.9 * math.log(3) < loss(module)
    assert torch.equal(module.net[2].base_layer.weight, trained_on(FORGET, 60, Base).net[2].weight)
    # Without adapters, the same callback has the radius of before.
    with pytest.warns(UserWarning, match="ended before the target"):
        fit(trained_on(FORGET, 60, Base), hamu, max_epochs=-1, max_steps=2)
    assert hamu.settings.rule.radius == RelativeRadius(2e-3)


def test_a_target_for_each_request() -> None:
    hamu = HAMUCallback({"a": DataLoader(FORGET, batch_size=40)}, target={"a": Chance()})
    rule = hamu.settings.for_module(adapted()).rule
    assert isinstance(rule, FeasibleDirection)
    assert rule.radius == AdapterRadius(5e-2)
    fit(module := adapted(), hamu, max_epochs=-1, max_steps=20)
    assert loss(module) > 0.3


@pytest.mark.parametrize("blocks", ["global", "tensor"])
def test_no_step_changes_the_weights_by_more(blocks: Any) -> None:
    module = adapted()
    layer, moved = module.net[2], []
    last = layer.weight()

    def note(*_: Any) -> None:
        nonlocal last
        moved.append(float((layer.weight() - last).norm() / layer.base_layer.weight.norm()))
        last = layer.weight()

    module.on_train_batch_end = note  # type: ignore[method-assign]
    fit(module, callback(HAMUQ(1e3, radius=AdapterRadius(0.01), blocks=blocks)), max_epochs=-1, max_steps=8)
    assert len(moved) == 8
    assert all(1e-3 < share <= 0.01 * (1 + 1e-5) for share in moved)  # float32


def test_a_wrong_reference_ends_the_fit_at_its_first_batch() -> None:
    module = adapted()
    fit(module, callback(HAMUQ(0.1), objective=NPO(reference=AdaptersDisabled())), max_epochs=-1, max_steps=1)
    module = adapted()
    module.net[2].lora_B.weight.data += 3 * torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(HAMUStateError, match="Expected AdaptersDisabled to be the module before unlearning"):
        fit(module, callback(HAMUQ(0.1), objective=NPO(reference=AdaptersDisabled())), max_epochs=-1, max_steps=1)


def test_a_fit_whose_steps_are_rounded_away_is_told() -> None:
    hamu = callback(HAMUQ(0.1, radius=FixedRadius(1e-12)))
    with pytest.warns(UserWarning, match="No weight has moved by more than its rounding in this fit"):
        fit(trained_on(FORGET, 60, Base), hamu, max_epochs=-1, max_steps=3)
    assert hamu.combined_steps == 3
    assert "No weight has moved by more than its rounding in this fit: the model is what it was." in hamu.summary
    hamu = callback(HAMUQ(0.1, radius=FixedRadius(1e-3)))
    fit(trained_on(FORGET, 60, Base), hamu, max_epochs=-1, max_steps=3)
    assert "No weight has moved" not in hamu.summary


def test_large_tensors_are_looked_at_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hamu_lightning.callbacks.goals._movement._MOST", 10)
    with pytest.warns(UserWarning, match=r"None of 31 weights, spread over all 227, has moved"):
        fit(trained_on(FORGET, 60, Base), callback(HAMUQ(0.1, radius=FixedRadius(1e-12))), max_epochs=-1, max_steps=2)


def test_a_budget_that_cannot_reach_the_target_is_told_at_the_start() -> None:
    hamu = callback(HAMUQ(TargetQuota(Chance()), radius=RelativeRadius(1e-6), blocks="global"))
    with pytest.warns(UserWarning) as told:
        fit(trained_on(FORGET, 60, Base), hamu, max_epochs=-1, max_steps=30)
    [message] = [str(w.message) for w in told if "out of reach" in str(w.message)]
    assert "The fit has 30. Give it more steps, or a larger radius, such as RelativeRadius(" in message
    # What it names is enough.
    fraction = float(message.rsplit("RelativeRadius(", 1)[1].split(")")[0])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        again = callback(HAMUQ(TargetQuota(Chance()), radius=RelativeRadius(2 * fraction), blocks="global"))
        fit(trained_on(FORGET, 60, Base), again, max_epochs=-1, max_steps=30)
    assert not [w for w in found if "out of reach" in str(w.message)]


def test_the_least_number_of_steps() -> None:
    """Against the loop: a level that grows by a share of itself, and by a constant."""
    level, steps = 0.002, 0
    while level < 2.0:
        level, steps = level * 1.05, steps + 1
    assert math.ceil(count_least(0.002, 2.0, 0.05 * 0.002)) == steps
    assert count_least(2.0, 1.0, 0.1) == 0
    assert count_least(1.0, 2.0, 0.0) == math.inf
