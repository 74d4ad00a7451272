"""What other projects do around a Trainer and inside a module; a small stand-in for each."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, HAMUOptimizer
from hamu_lightning.callbacks import HAMUMisconfigurationError
from hamu_lightning.callbacks._checks import MANUAL_RECIPE
from hamu_lightning.rules import FineTune, RelativeRadius
from tests.callbacks.modules import Base, WithDropout, build, fit, make_data
from tests.callbacks.passes.test_invariants import assert_no_trace

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")
RULE = HAMUQ(0.02, radius=RelativeRadius(0.05))


def forget_loader() -> DataLoader[Any]:
    return DataLoader(make_data(40, seed=9), batch_size=16, shuffle=True)


def weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Scores(WithDropout):
    """Has a score that rises with every step."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("score", float(self.global_step))
        return super().training_step(batch, batch_idx)


class Facade:
    """A library's own object with `train()`, which builds the Trainer, as pytorch-tabular and scvi-tools have.

    Args:
        copier: What it does to the callbacks.
        is_careless: Whether it goes on after an exception.
        checkpoint: A ModelCheckpoint, whose best model is loaded in the end.
    """

    def __init__(
        self, *, copier: Callable[[Any], Any] = list, is_careless: bool = False, checkpoint: Any = None
    ) -> None:
        self.module = build(Scores)
        self.copier, self.is_careless, self.checkpoint = copier, is_careless, checkpoint
        self.trainer: Any = None

    def train(self, callbacks: Sequence[Any] = (), **settings: Any) -> Facade:
        try:
            self.trainer, _ = fit(
                self.module,
                *self.copier(callbacks),
                *([] if self.checkpoint is None else [self.checkpoint]),
                **{"enable_checkpointing": self.checkpoint is not None, **settings},
            )
        except Exception:
            if not self.is_careless:
                raise
        if self.checkpoint is not None:
            best = torch.load(self.checkpoint.best_model_path, weights_only=True)
            self.module.load_state_dict(best["state_dict"])
        return self


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda callbacks: [*map(copy.copy, callbacks)]])
def test_a_facade_that_copies_callbacks(copier: Any) -> None:
    """The copy unlearns; the original knows nothing of it, but `callback_metrics` does."""
    original = HAMUCallback(forget_loader(), RULE)
    direct, copying = Facade().train([HAMUCallback(forget_loader(), RULE)]), Facade(copier=copier).train([original])
    assert torch.equal(weights(direct.module), weights(copying.module))
    assert original.combined_steps == 0
    assert float(copying.trainer.callback_metrics["hamu/combined_steps"]) == 12


def test_a_facade_that_pickles_callbacks() -> None:
    """Pickles hold no data: nothing is unlearnt in silence."""
    with pytest.raises(HAMUMisconfigurationError, match="Build it anew with its loaders"):
        Facade(copier=lambda callbacks: pickle.loads(pickle.dumps(callbacks))).train(
            [HAMUCallback(forget_loader(), RULE)]
        )


class Crashes(Callback):
    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            raise ZeroDivisionError("a project's bug")


def test_a_facade_that_swallows_exceptions(caplog: pytest.LogCaptureFixture) -> None:
    """The log says so, and the callback goes on in the next fit."""
    caplog.set_level(logging.INFO)
    callback, facade = HAMUCallback(forget_loader(), RULE), Facade(is_careless=True)
    facade.train([callback, Crashes()])
    assert "HAMU: ZeroDivisionError ended the fit after 3 combined steps." in caplog.text
    facade.train([callback])
    assert callback.combined_steps == callback.forget_passes == 3 + 12


def test_a_facade_whose_refused_fit_is_swallowed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Facade(is_careless=True).train([HAMUCallback(forget_loader())])  # without a rule
    assert "HAMU: HAMUMisconfigurationError ended the fit after 0 combined steps." in caplog.text


def test_a_second_training_without_and_with_the_callback() -> None:
    callback, facade = HAMUCallback(forget_loader(), RULE), Facade()
    for callbacks, steps in (([callback], 12), ([], 12), ([callback], 24)):
        facade.train(callbacks)
        assert callback.combined_steps == callback.forget_passes == steps


@pytest.mark.parametrize(
    ("monitor", "mode", "warns"),
    [("score", "min", True), ("score", "max", False), (None, "min", False), ("forget/score", "min", False)],
)
def test_a_facade_that_reloads_its_best_checkpoint(monitor: str | None, mode: Any, warns: bool, tmp_path: Path) -> None:
    """Nothing to warn about where the best one is the last one, or there is none, or it is the best at forgetting."""
    facade = Facade(checkpoint=ModelCheckpoint(tmp_path, monitor=monitor, mode=mode, every_n_train_steps=1))
    message = "best checkpoint by 'score' is from before the end of this fit. Whoever loads it"
    with pytest.warns(UserWarning, match=message) if warns else nullcontext():
        facade.train([HAMUCallback(forget_loader(), RULE)])


def test_no_warning_about_the_best_checkpoint_of_plain_training(tmp_path: Path) -> None:
    facade = Facade(checkpoint=ModelCheckpoint(tmp_path, monitor="score", every_n_train_steps=1))
    facade.train([HAMUCallback(forget_loader(), FineTune())])
    assert facade.checkpoint.best_model_path.endswith("step=1.ckpt")


class OwnsItsLoaders(Base):
    """`trainer.fit(module)`, and a step without an index."""

    @override
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return {"loss": super().training_step(batch, 0).reshape(1)}

    def train_dataloader(self) -> Any:
        return DataLoader(make_data(), batch_size=16)

    def forget_dataloader(self) -> Any:
        return DataLoader(make_data(40, seed=9), batch_size=16)


def test_a_module_that_owns_its_loaders() -> None:
    """The same as with the loaders given."""
    owner, other = build(OwnsItsLoaders), build(Base)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callback = HAMUCallback(rule=RULE)
    Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback], enable_model_summary=False, **quiet).fit(owner)
    fit(other, HAMUCallback(owner.forget_dataloader(), RULE), loader=owner.train_dataloader())
    assert torch.equal(weights(owner), weights(other)) and callback.combined_steps == 12


class WarmsUp(Base):
    """Overrides `optimizer_step`, as in Lightning's documentation: a warm-up by hand."""

    @override
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(1.0, (self.global_step + 1) / 4)
        optimizer.step(closure=optimizer_closure)


class StepsEverySecondBatch(Base):
    """Also from there: only runs the closure at the other batches."""

    @override
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class StepsTheInnerOptimizer(Base):
    """Goes past Lightning's wrapper, which then counts no step."""

    @override
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        getattr(optimizer, "optimizer", optimizer).step(optimizer_closure)


@pytest.mark.parametrize("kind", [WarmsUp, StepsEverySecondBatch])
def test_i1_with_an_overridden_optimizer_step(kind: Any) -> None:
    assert_no_trace(kind, "momentum")


@pytest.mark.parametrize("kind", [WarmsUp, StepsEverySecondBatch, StepsTheInnerOptimizer])
def test_an_overridden_optimizer_step_unlearns(kind: Any) -> None:
    module = build(kind)
    callback = HAMUCallback(forget_loader(), RULE)
    fit(module, callback)
    assert callback.combined_steps == (6 if kind is StepsEverySecondBatch else 12)
    assert callback.last_step is not None
    assert float(callback.last_step.coefficients.forget_improvement) >= 0.02 * (1 - 1e-6)


class KeepsInferenceTensors(Base):
    """Keeps what `Trainer.validate` computed, which is under `torch.inference_mode`."""

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.latest = [self(batch[0])]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_module_that_keeps_inference_tensors() -> None:
    module, callback = build(KeepsInferenceTensors), HAMUCallback(forget_loader(), RULE)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", **quiet).validate(module, DataLoader(make_data(32), batch_size=16), verbose=False)
    assert module.latest[0].is_inference()
    fit(module, callback)
    assert callback.combined_steps == 12


class NeedsItsProgressBar(Base):
    """Stands for the thread of RichProgressBar, which asks the trainer for itself at any time."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert self.trainer.progress_bar_callback is not None
        return super().training_step(batch, batch_idx)


def test_the_progress_bar_stays_in_the_forget_pass() -> None:
    fit(build(NeedsItsProgressBar), HAMUCallback(forget_loader(), RULE), ProgressBar(), enable_progress_bar=True)


def test_the_recipe_for_manual_optimization() -> None:
    """The lines in the message of the refusal, and in docs/projects.md, are a program that works."""
    lines = [line.strip() for line in MANUAL_RECIPE.splitlines()[1:]]
    page = (Path(__file__).parents[2] / "docs/projects.md").read_text()
    assert all(line in page for line in lines) and len(lines) == 5
    namespace = {"torch": torch, "HAMUQ": HAMUQ, "HAMUOptimizer": HAMUOptimizer, "loss_of": Base.training_step}
    program = (
        f"def configure_optimizers(self):\n    {lines[0]}\n    return optimizer\n"
        "def training_step(self, batch, batch_idx):\n"
        "    retain_loss, forget_loss = loss_of(self, batch, batch_idx), loss_of(self, self.forget, batch_idx)\n    "
        + "\n    ".join(lines[1:])
    )
    exec(program, namespace)
    names = ("configure_optimizers", "training_step")
    module = build(type("Manual", (Base,), {name: namespace[name] for name in names}))
    module.automatic_optimization = False
    module.forget = tuple(make_data(40, seed=9).tensors)
    before = weights(module)
    trainer, _ = fit(module)
    assert trainer.optimizers[0].steps == 12 and not torch.equal(before, weights(module))
