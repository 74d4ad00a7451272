"""What is told of a fit is true of it: no batch, part of the data, another optimizer, averages, promises, names."""

from __future__ import annotations

import logging
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, Holdout
from hamu_lightning.callbacks import HAMUMisconfigurationError
from hamu_lightning.callbacks._course import Course, have_parted
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.rules import FixedRadius, TargetQuota
from hamu_lightning.solvers import FeasibleDirection
from tests.callbacks.modules import Base, build, fit, make_data

RULE = HAMUQ(0.02, radius=FixedRadius(0.05))
FORGET = make_data(40, seed=9)


def loader(batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(FORGET, batch_size=batch_size, **options)


@pytest.mark.filterwarnings("ignore:.*`train_dataloader` yielded no|.*Trainer.*max_epochs=0")
@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"max_epochs": 1}, "max_epochs=1 is reached, with 1 epoch before this fit"),
        ({"max_epochs": -1, "max_steps": 6}, "max_steps=6 is reached, with 6 steps before this fit"),
        ({"limit_train_batches": 0, "max_epochs": 9}, "limit_train_batches is 0"),
    ],
)
def test_a_fit_without_a_batch(settings: Any, cause: str, tmp_path: Path) -> None:
    trainer, _ = fit(build(Base), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        with pytest.raises(HAMUStateError, match=f"ended without a training batch: {cause}.* make a new one"):
            fit(build(Base), HAMUCallback(loader(), RULE), ckpt_path=tmp_path / "trained.ckpt", **settings)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_job_that_is_started_again_when_it_is_done(tmp_path: Path) -> None:
    """It says so, and keeps its counts. Another request on the same checkpoint is an error: it has had no step."""
    trainer, _ = fit(build(Base), HAMUCallback(loader(), RULE), max_epochs=1)
    trainer.save_checkpoint(path := tmp_path / "done.ckpt")
    again = HAMUCallback(loader(), RULE)
    module = build(Base, seed=6)
    fit(module, again, ckpt_path=path, max_epochs=1)
    assert again.combined_steps == 6
    assert again.summary is not None and "no step in this fit, max_epochs=1 is reached" in again.summary
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), trainer.model.parameters(), strict=True))  # type: ignore[union-attr]
    others = {
        "other data": HAMUCallback(DataLoader(make_data(40, seed=8), batch_size=8), RULE),
        "other rule": HAMUCallback(loader(), HAMUQ(0.03, radius=FixedRadius(0.05))),
        "one request more": HAMUCallback({"a": loader(), "b": loader()}, FeasibleDirection({"a": 0.01, "b": 0.01})),
        "a target": HAMUCallback(loader(), target=2.0),
        "data that cannot be told": HAMUCallback([*loader()], RULE),
    }
    for other in others.values():
        with pytest.raises(HAMUStateError, match="ended without a training batch"):
            fit(build(Base), other, ckpt_path=path, max_epochs=1)
    with pytest.raises(HAMUStateError, match="limit_train_batches is 0"):
        fit(build(Base), HAMUCallback(loader(), RULE), ckpt_path=path, max_epochs=9, limit_train_batches=0)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The fit has ended before the target")
def test_a_target_that_was_not_reached_is_not_done(tmp_path: Path) -> None:
    trainer, _ = fit(build(Base), HAMUCallback(loader(), target=5.0), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "short.ckpt")
    with pytest.raises(HAMUStateError, match="max_epochs=1 is reached"):
        fit(build(Base), HAMUCallback(loader(), target=5.0), ckpt_path=tmp_path / "short.ckpt", max_epochs=1)


def test_a_trainer_that_has_fitted_already() -> None:
    module, callback = build(Base), HAMUCallback(loader(), RULE)
    trainer, _ = fit(module, max_epochs=1)
    trainer.callbacks.append(callback)  # type: ignore[attr-defined]
    with pytest.raises(HAMUStateError, match="max_epochs=1 is reached"):
        trainer.fit(module, DataLoader(make_data(), batch_size=16))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, DataLoader(make_data(), batch_size=16))
    assert callback.combined_steps == 6


@pytest.mark.parametrize(
    ("batch_size", "told"), [(2, " 12 of 20 forget batches were seen, the others never."), (8, "")]
)
def test_the_share_that_was_seen(batch_size: int, told: str) -> None:
    callback = HAMUCallback(loader(batch_size), RULE)
    fit(build(Base), callback)
    assert callback.summary is not None
    assert (told and told in callback.summary) or ("never" not in callback.summary and not told)


class Replaces(Base):
    """Sets its optimizers up anew in the second epoch."""

    @override
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.strategy.setup_optimizers(self.trainer)


class StepsItself(Base):
    """From the second epoch on the raw optimizer makes the steps."""

    @override
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.current_epoch == 0:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()
            optimizer.optimizer.base.step()


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Replaces, "at step 6 the Trainer has another one"), (StepsItself, "weights have moved without HAMUOptimizer")],
)
def test_steps_that_are_taken_out_of_our_hands(kind: type[Base], message: str) -> None:
    with pytest.raises(HAMUStateError, match=message):
        fit(build(kind), HAMUCallback(loader(), RULE))


def test_a_short_fit_tells_its_ends() -> None:
    """However rarely steps are logged; and what the steps promised beside what came."""
    callback, losses = HAMUCallback(loader(40), RULE), []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            with torch.no_grad():
                losses.append(float(cross_entropy(pl_module(FORGET.tensors[0]), FORGET.tensors[1])))

    fit(build(Base), callback, Look(), log_every_n_steps=50, max_epochs=1)
    assert callback.summary is not None
    assert f"forget loss {losses[0]:.4g} -> {losses[-1]:.4g}" in callback.summary
    # At least the quota in each step: a plain step that gives more is taken.
    promised = re.search(r"Promised in sum: forget loss \+(\S+) \(measured (\S+)\)\.", callback.summary)
    assert promised is not None
    assert 0.12 <= float(promised[1]) < 0.15
    assert float(promised[2]) == pytest.approx(losses[-1] - losses[0], rel=0.01)  # three digits


def test_promises_that_are_not_kept_are_warned_about_once() -> None:
    """Here the module puts its weights back after each step."""

    class Stuck(Base):
        @override
        def on_train_batch_end(self, *_: Any) -> None:
            self.load_state_dict(self.first)

        @override
        def on_train_start(self) -> None:
            self.first = {name: value.clone() for name, value in self.state_dict().items()}

    message = r"After 50 steps the forget loss has changed by \+0, and the steps promised \+1"
    with pytest.warns(UserWarning, match=message) as heard:
        fit(build(Stuck), HAMUCallback(loader(40), RULE), max_epochs=18)
    assert sum("steps promised" in str(warning.message) for warning in heard) == 1


def test_noise_is_no_broken_promise() -> None:
    assert have_parted(1.0, 1.0, 1e-4, 1e-4, 0.1)
    assert not have_parted(1.0, 1.0, 1e-2, 1e-2, 0.1)
    assert not have_parted(1.0, 1.05, 0.0, 0.0, 0.1)
    course = Course(torch.device("cpu"))
    assert course.numbers().isnan().all()
    course.add(torch.tensor(2.0))
    course.add_promise(torch.tensor(torch.nan), moved=torch.tensor(0))
    assert course.numbers()[[0, 1, 4]].tolist() == [2.0, 2.0, 0.0]


class Plateau(Base):
    fed: list[float]

    @override
    def configure_optimizers(self) -> Any:
        optimizer, fed = super().configure_optimizers(), self.fed

        class Scheduler(torch.optim.lr_scheduler.ReduceLROnPlateau):
            def step(self, metrics: Any, epoch: Any = None) -> None:
                fed.append(float(metrics))
                super().step(metrics, epoch)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Scheduler(optimizer), "monitor": "forget/loss"}}


@pytest.mark.parametrize("every", [1, 50])
def test_monitors_find_their_numbers_at_each_epoch_end(every: int, tmp_path: Path) -> None:
    module = build(Plateau)
    module.fed = []
    callback = HAMUCallback(loader(40), RULE, stop_on=["not_finite"])
    stopping = EarlyStopping("retain/loss", patience=9, check_on_train_epoch_end=True)
    saving = ModelCheckpoint(tmp_path, monitor="hamu/score", mode="max")
    trainer, _ = fit(module, callback, stopping, saving, enable_checkpointing=True, log_every_n_steps=every)
    assert len(module.fed) == 2 and module.fed[1] > module.fed[0]
    assert saving.best_model_score is not None and saving.best_model_score > 0
    assert stopping.best_score.isfinite()
    assert float(trainer.callback_metrics["forget/loss"]) == pytest.approx(module.fed[1])  # float32


@pytest.mark.parametrize(
    "make",
    [lambda: EMAWeightAveraging(decay=0.99), lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)],
)
def test_an_average_of_the_weights_is_warned_about(make: Any) -> None:
    average, callback = make(), HAMUCallback(loader(), RULE)
    with pytest.warns(UserWarning, match=f"{type(average).__name__} puts an average of the weights in the place of"):
        fit(build(Base), average, callback)
    assert callback.summary is not None and "an average: no number here is of it" in callback.summary


@pytest.mark.parametrize("name", ["train", "val", "hamu"])
def test_names_that_modules_log_by_are_refused(name: str) -> None:
    with pytest.raises(HAMUValueError, match=f"'{name}/loss' is what many modules log"):
        HAMUCallback({name: loader()}, FeasibleDirection({name: 0.02}))
    callback = HAMUCallback({"a": loader()}, FeasibleDirection({"a": 0.02}))
    with pytest.raises(HAMUValueError, match="reserved are train"):
        callback.add_request(name, loader(), 0.1)


def test_a_name_that_the_module_logs_by_is_kept() -> None:
    class Logs(Base):
        @override
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("client/loss", 7.0)
            return super().training_step(batch, batch_idx)

    forget = {"client": loader(), "other": DataLoader(make_data(40, seed=3), batch_size=8)}
    rule = FeasibleDirection({"client": 0.02, "other": 0.01}, radius=FixedRadius(0.05))
    with pytest.warns(UserWarning, match="The module logs 'client/loss' itself.* 'hamu/client/loss'") as heard:
        trainer, _ = fit(build(Logs), HAMUCallback(forget, rule), log_every_n_steps=1)
    assert sum("logs 'client/loss' itself" in str(warning.message) for warning in heard) == 1
    found = {name: float(trainer.callback_metrics[name]) for name in ("client/loss", "hamu/client/loss", "other/loss")}
    assert found["client/loss"] == 7.0 and found["hamu/client/loss"] < 7.0


SECRET = 0.123456789


def test_pickles_hold_no_data() -> None:
    """And say so at the next fit; copies in the process hold it, see the facades."""
    data = make_data(40, seed=9)
    data.tensors[0][3] = SECRET
    callback = HAMUCallback(DataLoader(data, batch_size=8), target=Holdout(data))
    written = pickle.dumps(callback)
    assert data.tensors[0][3].numpy().tobytes() not in written
    with pytest.raises(
        HAMUMisconfigurationError, match=r"data of 'forget' \(DataLoader of length 5\), but .* a pickle"
    ):
        fit(build(Base), pickle.loads(written))
    again = HAMUCallback(loader(), pickle.loads(written).settings.rule)
    with pytest.raises(HAMUMisconfigurationError, match="data of 'the target of forget'"):
        fit(build(Base), again)


class Saves(Callback):
    """A callback that saves by itself, in the hook in which a window ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_callback_that_saves_beside_ours(is_first: bool, tmp_path: Path) -> None:
    ends = []
    for checkpoint in (None, tmp_path / "saved.ckpt"):
        callback, saves = HAMUCallback(loader(shuffle=True), RULE, verify=True), Saves(tmp_path / "saved.ckpt")
        data = DataLoader(make_data(16), batch_size=16)
        pair = [saves, callback] if is_first else [callback, saves]
        module = build(Base)
        fit(module, *pair, loader=data, max_epochs=6, log_every_n_steps=2, ckpt_path=checkpoint)
        ends.append((callback.state_dict(), [p.tolist() for p in module.parameters()]))
    assert str(ends[0]) == str(ends[1])
    assert ends[0][0]["combined_steps"] == 6


def test_a_start_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("hamu_lightning.callbacks._compat.StepPatch.__init__", fail)
    module, callback = build(Base), HAMUCallback(loader(), RULE)
    with pytest.raises(ZeroDivisionError):
        fit(module, callback)
    assert type(module.trainer.optimizers[0]) is torch.optim.SGD
    assert "training_step" not in vars(module.trainer.strategy)


def test_the_message_has_the_level_that_was_measured(caplog: pytest.LogCaptureFixture) -> None:
    """Not the one after the next batch, of few samples, was taken in."""
    caplog.set_level(logging.INFO)
    x, y = (tensor[:16] for tensor in FORGET.tensors)
    rule = HAMUQ(TargetQuota(2.0), radius=FixedRadius(0.3))
    callback, module = HAMUCallback(DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True), rule), build(Base)
    fit(module, callback, max_epochs=20)
    with torch.no_grad():
        level = float(cross_entropy(module(x), y))
    assert callback.stop_message == f"forget loss {level:.4g} for a target of 2."


@pytest.mark.filterwarnings("ignore:The fit has ended before the target", "ignore:The number of training batches")
@pytest.mark.parametrize(
    ("first", "arguments", "steps"),
    [
        ("HAMU: 2 combined steps (0 left out).", {"rule": HAMUQ(1e-3)}, 2),
        ("HAMU: 2 combined steps (0 left out), short of the target.", {"target": 9.0}, 2),
    ],
)
def test_the_summary_is_a_block(
    first: str, arguments: dict[str, Any], steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    hamu = HAMUCallback(DataLoader(make_data(), batch_size=16), **arguments)
    with caplog.at_level("INFO"):
        fit(build(Base), hamu, max_steps=steps)
    head, *lines = (hamu.summary or "").splitlines()
    assert head == first and len(lines) >= 2
    assert all(line.startswith("  ") and line.endswith((".", ":")) for line in lines)
    (told,) = (record.message for record in caplog.records if record.message.startswith("HAMU: 2 combined"))
    assert max(map(len, told.splitlines())) <= 80 and told.split() == (hamu.summary or "").split()
