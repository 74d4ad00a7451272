"""One callback class in the Trainers of both packages, `lightning.pytorch` and `pytorch_lightning`."""

from __future__ import annotations

import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import lightning.fabric.utilities.exceptions
import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.callbacks import HAMUMisconfigurationError, PassOptions
from hamu_lightning.rules import FineTune, RelativeRadius
from tests.callbacks.modules import Recorder, make_data
from tests.callbacks.passes.test_invariants import GradientsAreEqual, SameRandomState
from tests.distributed import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")
PACKAGES: dict[str, Any] = {"lightning": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
RULE = HAMUQ(0.02, radius=RelativeRadius(0.05))


def make_module(package: str, dropout: float = 0.3, **attributes: Any) -> Any:
    """BatchNorm, dropout, a logged torchmetrics object and a list, as a LightningModule of the package."""

    class Module(PACKAGES[package].LightningModule):  # type: ignore[misc]
        n_optimizers = 1

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.Dropout(dropout), nn.Linear(16, 3))
            self.accuracy, self.sizes = MulticlassAccuracy(3), []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self.net(batch[0])
            self.accuracy(logits, batch[1])
            self.sizes.append(len(logits))
            self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
            return {"loss": cross_entropy(logits, batch[1])}

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.05) for _ in range(self.n_optimizers)]

    torch.manual_seed(5)
    module = Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def make_trainer(package: str, *callbacks: Any, **settings: Any) -> Any:
    PACKAGES[package].seed_everything(1, verbose=False)
    options: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 2}
    return PACKAGES[package].Trainer(**{**options, **quiet, **settings}, callbacks=list(callbacks))


def make_callback(rule: Any = RULE, **options: Any) -> HAMUCallback:
    forget = DataLoader(make_data(40, seed=9), batch_size=16, shuffle=True)
    return HAMUCallback(forget, rule, **options)


def train_loader() -> DataLoader[Any]:
    return DataLoader(make_data(), batch_size=16)


def run(package: str, *callbacks: Any, dropout: float = 0.3, **settings: Any) -> tuple[Any, list[dict[str, float]]]:
    """Fit; return the state of the module and what was logged at each batch."""
    module, recorder = make_module(package, dropout), Recorder()
    make_trainer(package, *callbacks, recorder, **settings).fit(module, train_loader())
    return {**module.state_dict(), "sizes": torch.tensor(module.sizes)}, recorder.values


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1}], ids=str)
def test_both_packages_give_the_same_run(settings: dict[str, Any]) -> None:
    callbacks = {name: make_callback(preflight=True) for name in PACKAGES}
    (ours, logged), (theirs, logged_there) = (run(name, callbacks[name], **settings) for name in PACKAGES)
    assert_equal(ours, theirs)
    assert logged == logged_there and "accuracy_step" in logged[0]
    reports = [str(callback.preflight_report) for callback in callbacks.values()]
    assert reports[0] == reports[1] != "None"


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1}], ids=str)
def test_i1_no_trace_under_pytorch_lightning(settings: dict[str, Any]) -> None:
    plain, logged = run("pytorch_lightning", **settings)
    callback = make_callback(FineTune(), passes=PassOptions(batchnorm="retain"))
    paired, logged_there = run("pytorch_lightning", callback, **settings)
    assert_equal(plain, paired)
    assert logged == logged_there and callback.forget_passes == len(logged) == 12


def test_i2_self_cancellation_under_pytorch_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hamu_lightning.callbacks._group.RandomStream", SameRandomState)
    check = GradientsAreEqual()
    run("pytorch_lightning", HAMUCallback(list(train_loader()), FineTune()), check)
    assert check.steps == 12


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(("saved_by", "loaded_by"), [*product(PACKAGES, PACKAGES)])
def test_a_checkpoint_in_the_middle_resumes_in_either_package(saved_by: str, loaded_by: str, tmp_path: Path) -> None:
    """Saved after the first of two epochs, by its own ModelCheckpoint. No dropout: Lightning keeps no random state."""
    expected, _ = run("lightning", make_callback(), dropout=0.0)

    def checkpoints(package: str) -> Any:
        return PACKAGES[package].callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)

    run(saved_by, make_callback(), checkpoints(saved_by), dropout=0.0, enable_checkpointing=True)
    module, resumed = make_module(loaded_by, dropout=0.0), make_callback()
    trainer = make_trainer(loaded_by, resumed, checkpoints(loaded_by), enable_checkpointing=True)
    trainer.fit(module, train_loader(), ckpt_path=tmp_path / "step=6.ckpt", weights_only=True)
    assert_equal(module.state_dict(), {name: value for name, value in expected.items() if name != "sizes"})
    assert resumed.combined_steps == resumed.forget_passes == 12 and len(module.sizes) == 6


class BelongsToPytorchLightning(pytorch_lightning.Callback):
    batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1


def test_everything_is_taken_back_under_pytorch_lightning() -> None:
    module, other = make_module("pytorch_lightning"), BelongsToPytorchLightning()
    trainer = make_trainer("pytorch_lightning", make_callback(), other)
    trainer.fit(module, train_loader())
    assert type(trainer.optimizers[0]) is torch.optim.SGD and "training_step" not in vars(trainer.strategy)
    assert other.batches == 12  # callbacks of both trees, side by side


@pytest.mark.parametrize(
    ("attributes", "options", "message"),
    [
        ({"automatic_optimization": False}, {}, "Expected automatic optimization"),
        ({"n_optimizers": 0}, {}, "Expected one optimizer"),
        ({}, {"rule": None}, "Expected `rule`, such as"),
        ({}, {"forget": None}, "Expected to find the data of 'forget'"),
    ],
)
@pytest.mark.parametrize("package", PACKAGES)
def test_refusals_are_the_misconfiguration_exceptions_of_both(
    package: str, attributes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    """`except MisconfigurationException` of a project catches ours, whichever package it is from."""
    trainer = make_trainer(package, HAMUCallback(**{"forget": make_data(), "rule": RULE, **options}))
    with pytest.raises(HAMUMisconfigurationError, match=message) as caught:
        trainer.fit(make_module(package, **attributes), train_loader())
    assert isinstance(caught.value, MisconfigurationException) == (package == "pytorch_lightning")
    assert isinstance(caught.value, lightning.fabric.utilities.exceptions.MisconfigurationException)


def test_a_callback_without_a_list_is_refused_by_pytorch_lightning() -> None:
    """It asks `isinstance(callbacks, Callback)` for its own class; docs/projects.md says so."""
    with pytest.raises(TypeError, match="not iterable"):
        pytorch_lightning.Trainer(callbacks=make_callback(), logger=False)


def test_pytorch_lightning_is_never_imported_by_us() -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); from tests.callbacks.modules import *; "
        "from hamu_lightning import HAMUCallback; from hamu_lightning.rules import FineTune; "
        "fit(build(Base), HAMUCallback(make_data(), FineTune()), max_steps=1); "
        "print([name for name in sys.modules if name.startswith(('pytorch_lightning', 'lightning_fabric'))])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def fit_on_two(rank: int) -> list[Any]:
    warnings.simplefilter("ignore")
    results = []
    for package in PACKAGES:
        callback = make_callback(progress_bar=True)
        state, _ = run(package, callback, strategy="ddp", devices=2)
        results.append(([value.tolist() for value in state.values()], callback.combined_steps))
    return results


def test_two_processes_under_both_packages() -> None:
    first, second = run_ranks(fit_on_two, 2)
    assert first[0] == first[1] and first[0][1] == second[0][1] == 6  # both packages
    # Weights and steps are those of the other process; BatchNorm's statistics and the sizes need not be.
    assert first[0][0][0] == second[0][0][0]
