"""The preflight at the start of a fit: the run stays the same, and what it finds is what the function finds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Sampler
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, SecondChoice, preflight
from hamu_lightning.objectives import NPO
from hamu_lightning.rules import FineTune, RelativeRadius, TargetQuota
from tests.callbacks.forecast.setups import (
    RULE,
    TARGET,
    AsksForTrainer,
    ConfiguresWithTrainer,
    retain_loader,
    run,
)
from tests.callbacks.modules import MODULES, Base, EditsItsBatch, WithBatchNorm, WithDropout, build, fit, make_data
from tests.callbacks.passes.test_invariants import forget_loader
from tests.distributed import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


def paired(**options: Any) -> CombinedLoader:
    return CombinedLoader({"retain": retain_loader(**options), "forget": forget_loader()}, "max_size_cycle")


def own_generator() -> DataLoader[Any]:
    return retain_loader(generator=torch.Generator().manual_seed(4))


class Batches:
    """Hands out the same objects in each pass."""

    def __init__(self) -> None:
        self.batches = list(retain_loader())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Shuffles(Sampler[int]):
    """A sampler with random numbers of its own, another order in each pass."""

    def __init__(self) -> None:
        self.numbers = np.random.default_rng(3)

    def __iter__(self) -> Iterator[int]:
        yield from self.numbers.permutation(96).tolist()

    def __len__(self) -> int:
        return 96


RUNS: dict[str, dict[str, Any]] = {
    **{kind.__name__: {"kind": kind, "batchnorm": "retain"} for kind in MODULES},
    "frozen BatchNorm": {"kind": WithBatchNorm},
    "accumulation": {"kind": WithDropout, "accumulate_grad_batches": 4},
    "clipping": {"gradient_clip_val": 0.05},
    "adamw": {"optimizer": "adamw", "rule": FineTune()},
    "momentum": {"optimizer": "momentum", "rule": FineTune()},
    "16-mixed": {"kind": WithBatchNorm, "precision": "16-mixed"},
    "16-mixed, clipping": {"precision": "16-mixed", "gradient_clip_val": 0.05},
    "bf16-mixed": {"kind": WithDropout, "precision": "bf16-mixed"},
    "paired": {"kind": WithDropout, "loader": paired, "forget": lambda: None},
    "a generator of the loader": {"kind": WithDropout, "loader": own_generator},
    "the same batches, edited in place": {"loader": lambda: Batches(), "kind": EditsItsBatch},
    "a sampler with a state": {"loader": lambda: DataLoader(make_data(), 16, sampler=Shuffles())},
    "a target": {"kind": WithBatchNorm, "rule": TARGET},
    "workers that stay": {"loader": lambda: retain_loader(num_workers=2, persistent_workers=True)},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_with_and_without(name: str) -> None:
    results = []
    for flag in (False, True):
        settings = {**RUNS[name], "forget": RUNS[name].get("forget", forget_loader)()}
        if "loader" in settings:
            torch.manual_seed(2)
            settings["loader"] = settings["loader"]()
        found, callback = run(flag, **settings)
        assert (callback.preflight_report is not None) == flag
        results.append(found)
    assert results[0] == results[1]


def test_the_callback_finds_what_the_function_finds() -> None:
    """With accumulation too, where Lightning divides the loss of each batch."""
    expected = preflight(build(WithBatchNorm), retain_loader(), forget_loader(), RULE).as_dict()
    for settings in ({}, {"accumulate_grad_batches": 4}):
        _, callback = run(True, WithBatchNorm, forget=forget_loader(), **settings)  # type: ignore[arg-type]
        found = callback.preflight_report.as_dict()
        assert found["pairs"] == expected["pairs"] == 6
        for key in ("kappa", "retain_cost", "free_quota", "forget_loss"):
            assert found[key]["values"] == pytest.approx(expected[key]["values"], rel=1e-5), key  # float32 gradients


def test_clipping_and_the_loss_scale_are_taken_into_account() -> None:
    _, plain = run(True, forget=forget_loader())
    _, scaled = run(True, forget=forget_loader(), precision="16-mixed")
    for key in ("kappa", "retain_norm", "forget_norm"):
        expected = plain.preflight_report.estimates[key].mean
        assert scaled.preflight_report.estimates[key].mean == pytest.approx(expected, rel=0.02), key  # half precision
    for precision in ("32-true", "16-mixed"):
        _, clipped = run(True, forget=forget_loader(), gradient_clip_val=0.05, precision=precision)
        for key in ("retain_norm", "forget_norm"):
            assert clipped.preflight_report.estimates[key].mean == pytest.approx(0.05, rel=1e-3), key


def test_a_target_is_measured_and_divided_among_the_steps() -> None:
    """In the fit: log 3 in two thirds of 12 steps. Without a Trainer: both given."""
    given = HAMUQ(TargetQuota(math.log(3), steps=8), radius=RelativeRadius(0.05))
    reports = [preflight(build(Base), retain_loader(), forget_loader(), given)]
    reports.append(run(True, forget=forget_loader(), rule=TARGET)[1].preflight_report)
    for report in reports:
        assert report.target == pytest.approx(math.log(3))
        for quota, loss, largest in zip(
            *(report.estimates[name].values for name in ("quota", "forget_loss", "largest_quota")), strict=True
        ):
            assert quota == pytest.approx(min((math.log(3) - loss) / 8, 0.9 * largest), abs=1e-6)  # float32 losses
    assert reports[0].as_dict()["steps_to_target"] is not None


@pytest.mark.filterwarnings("ignore:The fit has ended before the target")
@pytest.mark.parametrize(
    ("raised", "arguments"),
    [
        ("forget loss", {"target": 2.0}),
        ("forget objective", {"target": 2.0, "objective": NPO()}),
        ("progress to the answer (nats)", {"target": SecondChoice()}),
    ],
)
def test_what_is_raised_is_called_what_it_is(raised: str, arguments: dict[str, Any]) -> None:
    callback = HAMUCallback(forget_loader(), preflight=True, **arguments)
    fit(build(Base, "sgd"), callback, max_epochs=1)
    report = callback.preflight_report
    assert report is not None and report.raised == report.as_dict()["raised"] == raised
    told = str(report)
    assert f"\n{raised} " in told and max(map(len, told.splitlines())) <= 80
    assert (raised == "forget loss") == ("forget loss" in told)


def test_limited_batches() -> None:
    _, callback = run(True, forget=forget_loader(), limit_train_batches=2)
    assert callback.preflight_report.pairs == 2


class PreparesInHooks(Base):
    """Callbacks' hooks run before its own ones."""

    @override
    def on_train_start(self) -> None:
        self.scale = 2.0

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.names = tuple(self.__dict__)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * self.scale * len(self.names)


@pytest.mark.parametrize("kind", [AsksForTrainer, ConfiguresWithTrainer, PreparesInHooks])
def test_what_needs_a_trainer_works_in_a_fit(kind: type[Base]) -> None:
    _, callback = run(True, kind, forget=forget_loader())
    assert callback.preflight_report.pairs == 6


class OneShot:
    """A training loader that is its own iterator."""

    def __init__(self) -> None:
        self.batches = iter(retain_loader())

    def __iter__(self) -> OneShot:
        return self

    def __next__(self) -> Any:
        return next(self.batches)


def test_a_training_loader_that_would_be_used_up_is_refused_in_a_fit() -> None:
    with pytest.raises(MisconfigurationException, match="got a OneShot, which can be iterated only once"):
        run(True, forget=forget_loader(), loader=OneShot())


def fit_on_a_rank(rank: int) -> str:
    callback = HAMUCallback(forget_loader(), RULE, preflight=True)
    try:
        fit(build(Base), callback, strategy=DDPStrategy(process_group_backend="gloo"), devices=2)
    except MisconfigurationException as error:
        return str(error)
    return "not refused"


def test_several_processes_are_refused() -> None:
    assert all("Expected one process with `preflight=True`" in message for message in run_ranks(fit_on_a_rank, 2))
