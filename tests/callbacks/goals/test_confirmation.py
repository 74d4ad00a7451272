"""A check of the user's own, before a target counts as reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from hamu_lightning import HAMUCallback
from hamu_lightning.callbacks import StopReason
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.rules import HAMUQ, RelativeRadius, TargetQuota
from tests.callbacks.goals.test_targets import FORGET, loss_on, trained
from tests.callbacks.modules import Base, fit


class UntilLoss:
    """Speaks against a target until the loss has come to a level."""

    def __init__(self, level: float) -> None:
        self.level = level
        self.asked: list[float] = []
        self.modes: set[bool] = set()

    def __call__(self, module: nn.Module) -> str:
        self.modes.add(module.training)
        self.asked.append(loss_on(module, FORGET))  # type: ignore[arg-type]
        return "" if self.asked[-1] >= self.level else f"the loss is only {self.asked[-1]:.2f}"


def reach(module: Base, confirm: Callable[[Any], str | None], **options: Any) -> HAMUCallback:
    rule = HAMUQ(TargetQuota(0.5, steps=20), radius=RelativeRadius(0.02))
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=40), rule, verify=True, confirm=confirm)
    fit(module, hamu, **{"max_epochs": 20, **options})
    return hamu


def test_a_target_is_not_reached_before_the_check_passes() -> None:
    module, confirm = trained(), UntilLoss(0.55)
    hamu = reach(module, confirm)
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    assert loss_on(module, FORGET) == confirm.asked[-1] >= 0.55
    assert 2 <= len(confirm.asked) <= 6 and confirm.asked[0] >= 0.95 * 0.5  # not at every step, and not before
    assert confirm.modes == {False} and module.training
    assert "for a target of 0.5" in (hamu.stop_message or "")
    assert "Not gone" not in hamu.summary


def test_with_a_check_no_step_is_asked_for_more_than_half_of_the_capacity() -> None:
    checked, plain = (HAMUCallback(FORGET, target=0.5, confirm=check) for check in (UntilLoss(1.0), None))
    several = HAMUCallback(
        {"one": FORGET, "two": FORGET}, target={"one": 0.5, "two": 0.5}, confirm={"two": UntilLoss(1)}
    )
    assert [hamu.settings.rule.target_quotas["forget"].share for hamu in (checked, plain)] == [0.5, 0.9]
    assert {name: quota.share for name, quota in several.settings.rule.target_quotas.items()} == {
        "one": 0.9,
        "two": 0.5,
    }


def test_what_never_passes_is_told_and_bounded() -> None:
    module, confirm = trained(), UntilLoss(100.0)
    with pytest.warns(UserWarning, match="reached its target, but the loss is only .*; the mean was led to"):
        hamu = reach(module, confirm, max_epochs=14)
    assert hamu.stop_reason is None
    assert loss_on(module, FORGET) < 1.15 * 3 * 0.5
    assert f"Not gone: the loss is only {loss_on(module, FORGET):.2f}; the mean was led to" in hamu.summary


def test_a_check_that_fails_does_not_let_an_end_be_said() -> None:
    module = trained()
    with pytest.warns(UserWarning, match="The mean has reached its target, but no"):
        assert reach(module, lambda _: "no", max_epochs=6).stop_reason is None


@pytest.mark.parametrize("answer", [False, True, 0, ["a"], torch.ones(2)])
def test_an_answer_that_is_no_words_is_refused(answer: Any) -> None:
    """False could mean that it is not gone."""
    with pytest.raises(HAMUStateError, match="Expected `confirm` to return in words"):
        reach(trained(), lambda _: answer)


def test_a_check_that_moves_weights_is_refused() -> None:
    """The fit would be said to have reached what the check has done."""

    def attack(module: nn.Module) -> str:
        next(module.parameters()).data.add_(1.0)
        return ""

    with pytest.raises(HAMUStateError, match="Expected `confirm` to leave the weights as they are"):
        reach(trained(), attack)


def test_blanks_speak_against_nothing() -> None:
    assert reach(trained(), lambda _: "  ").stop_reason is StopReason.TARGET_REACHED


def test_without_a_target_there_is_nothing_to_confirm() -> None:
    with pytest.raises(HAMUValueError, match="Expected a target with `confirm`"):
        HAMUCallback(FORGET, HAMUQ(0.1), confirm=UntilLoss(1.0))
    with pytest.raises(HAMUValueError, match="Expected a target with `confirm` of 'other'"):
        HAMUCallback({"one": FORGET}, target={"one": 0.5}, confirm={"other": UntilLoss(1.0)})
    with pytest.raises(HAMUValueError, match="to be a function of the module"):
        HAMUCallback(FORGET, target=0.5, confirm=UntilLoss)  # type: ignore[arg-type]
