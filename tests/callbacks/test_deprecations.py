"""What HAMUCallback still takes in its old place. Whoever raises the version to 0.4 takes it away, after 2027-06-01."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from hamu_lightning import HAMUQ, HAMUCallback, __version__
from hamu_lightning.callbacks import PassOptions, StepOptions
from hamu_lightning.callbacks._settings import DEPRECATED_UNTIL, DEPRECATED_UNTIL_VERSION, DeprecatedOptions
from hamu_lightning.errors import HAMUValueError

OLD: dict[str, Any] = {
    "batch_size": 32,
    "batchnorm": "retain",
    "every_n_steps": 2,
    "groups_per_step": 3,
    "exact": True,
    "track_actual": True,
    "sketch": 64,
    "mask": {"weight": torch.ones(2) > 0},
}


def test_the_date() -> None:
    assert DEPRECATED_UNTIL == "2027-06-01"
    version = [tuple(int(n) for n in v.split(".")[:2]) for v in (__version__, DEPRECATED_UNTIL_VERSION)]
    assert version[0] < version[1], "remove the deprecated options of HAMUCallback"


def test_none_is_forgotten() -> None:
    assert set(OLD) == set(DeprecatedOptions.__annotations__)


@pytest.mark.parametrize("name", OLD)
def test_an_old_name_works_and_warns(name: str) -> None:
    kind = PassOptions if hasattr(PassOptions(), name) else StepOptions
    home = "passes" if kind is PassOptions else "steps"
    cure = re.escape(f"`{home}={kind.__name__}({name}=...)`")
    with pytest.warns(FutureWarning, match=f"goes with version 0.4, not before 2027-06-01: write {cure}") as caught:
        callback = HAMUCallback([], HAMUQ(1e-3), **{name: OLD[name]})
    assert caught[0].filename == __file__
    assert getattr(getattr(callback.settings, home), name) is OLD[name]
    assert getattr(callback.settings, home) == kind(**{name: OLD[name]})


def test_all_together() -> None:
    with pytest.warns(FutureWarning) as caught:
        callback = HAMUCallback([], HAMUQ(1e-3), seed=4, **OLD)
    assert len(caught) == len(OLD)
    assert callback.settings.passes == PassOptions(32, "retain", 2, 3)
    assert callback.settings.steps.mask is OLD["mask"]


def test_in_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=HAMUCallback)
    old = {"class_path": "hamu_lightning.HAMUCallback", "init_args": {"batch_size": 32, "exact": True}}
    with pytest.warns(FutureWarning, match="deprecated"):
        callback = parser.instantiate(parser.parse_object({"callback": old})).callback
    assert callback.settings.passes == PassOptions(batch_size=32)
    assert callback.settings.steps == StepOptions(exact=True)


def test_not_in_both_places() -> None:
    with pytest.raises(HAMUValueError, match="Expected `batch_size` inside of `passes`, but got both"):
        HAMUCallback([], HAMUQ(1e-3), passes=PassOptions(every_n_steps=2), batch_size=3)


def test_an_unknown_name() -> None:
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'batchsize'"):
        HAMUCallback([], HAMUQ(1e-3), batchsize=3)  # type: ignore[call-arg]


def test_bad_values_are_refused_as_in_the_new_place() -> None:
    with pytest.warns(FutureWarning), pytest.raises(HAMUValueError, match="Expected `every_n_steps` to be at least 1"):
        HAMUCallback([], HAMUQ(1e-3), every_n_steps=0)
