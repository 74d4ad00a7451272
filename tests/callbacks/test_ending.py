"""Who ended the fit is named, where it was not unlearning itself."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.rules import FixedRadius, TargetQuota
from tests.callbacks.modules import Base, build, fit, make_data

pytestmark = pytest.mark.filterwarnings(
    "ignore:The fit has ended before the target", "ignore:The target of 'forget' is out of reach"
)
TOWARDS = HAMUQ(TargetQuota(9.0), radius=FixedRadius(1e-3))
WITHOUT = HAMUQ(1e-3, radius=FixedRadius(1e-3))


class Stops(Callback):
    @override
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 4


def impatient(patience: int) -> EarlyStopping:
    return EarlyStopping("train_loss_epoch", patience=patience, min_delta=10.0, check_on_train_epoch_end=True)


CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "early stopping": (
        lambda: impatient(1),
        {"max_epochs": 9},
        " EarlyStopping (train_loss_epoch) ended the fit after 12 of 54 steps; a validation set that holds what is "
        "forgotten will do that.",
    ),
    "early stopping in the first epoch": (
        lambda: EarlyStopping("train_loss_epoch", stopping_threshold=99.0, check_on_train_epoch_end=True),
        {"max_epochs": 9},
        " EarlyStopping (train_loss_epoch) ended the fit after 6 of 54 steps; ",
    ),
    "time": (
        Callback,
        {"max_epochs": 9, "max_time": timedelta(milliseconds=1)},
        " Timer (max_time) ended the fit after ",
    ),
    "another": (Stops, {"max_epochs": 9}, " Another callback, or the module, ended the fit after 4 of 54 steps: "),
    "patience left": (lambda: impatient(9), {"max_steps": 3}, " max_steps=3 ended the fit."),
    "steps": (Callback, {"max_steps": 3}, " max_steps=3 ended the fit."),
    "epochs": (Callback, {"max_epochs": 1}, " max_epochs=1 ended the fit."),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rule", [TOWARDS, WITHOUT])
def test_it_is_named(name: str, rule: Any) -> None:
    make, options, words = CASES[name]
    hamu = HAMUCallback(DataLoader(make_data(40, 9), batch_size=20), rule)
    fit(build(Base), hamu, make(), **options)
    assert hamu.summary is not None
    # Without a target a limit is the end that was asked for.
    assert (words in hamu.summary) == (rule is TOWARDS or "max_" not in words or "max_time" in words)


def test_where_unlearning_ended_it_nobody_else_is_named() -> None:
    hamu = HAMUCallback(DataLoader(make_data(40, 9), batch_size=20), HAMUQ(9.0), stop_on=["infeasible"])
    fit(build(Base), hamu, impatient(1), max_epochs=9)
    assert hamu.stop_reason is not None
    assert "ended the fit" not in (hamu.summary or "")
