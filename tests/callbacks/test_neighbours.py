"""Other callbacks beside ours, in either order: they see the retain stream alone, and do what they do without us."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.rules import FineTune, RelativeRadius
from tests.callbacks.modules import Base, WithBatchNorm, WithDropout, build, fit, make_data
from tests.callbacks.passes.test_invariants import forget_loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The base optimizer SGD has momentum"),
]
RULE = HAMUQ(0.02, radius=RelativeRadius(0.05), blocks="layer")


class Unfreezes(BaseFinetuning):
    """Adds the first layer to the optimizer in the second epoch."""

    @override
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    @override
    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)
        elif epoch > 1:  # after a resume: `setup` has frozen it again
            self.make_trainable(pl_module.net[0])


class HeadOnly(Base):
    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.05, momentum=0.9)


class Meddles(Callback):
    """Hooks the places that we hook: edits batches and gradients, moves weights, and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch[0].mul_(1.1)

    @override
    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        with torch.no_grad():
            pl_module.net[0].weight.mul_(0.999)

    @override
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(pl_module.net[0].weight.grad.tolist())

    @override
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        pl_module.net[0].weight.grad.mul_(2)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))


NEIGHBOURS: dict[str, tuple[type[Base], Callable[[Path], Callback]]] = {
    "swa": (Base, lambda path: StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1, annealing_epochs=1)),
    "swa, batchnorm": (WithBatchNorm, lambda path: StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)),
    "weight averaging": (WithBatchNorm, lambda path: WeightAveraging()),
    "ema": (Base, lambda path: EMAWeightAveraging(decay=0.8)),
    "early stopping": (Base, lambda path: EarlyStopping("train_loss", patience=1, min_delta=10.0)),
    "checkpoint": (Base, lambda path: ModelCheckpoint(path, monitor="train_loss", every_n_train_steps=1, save_top_k=2)),
    "accumulation": (Base, lambda path: GradientAccumulationScheduler({1: 4})),
    "finetuning": (HeadOnly, lambda path: Unfreezes()),
    "meddles": (Base, lambda path: Meddles()),
    "pruning": (Base, lambda path: ModelPruning("l1_unstructured", amount=0.1)),
}


def fit_beside(module: Base, *callbacks: Callback, **settings: Any) -> tuple[Any, Any]:
    """Fit on three batches per epoch."""
    return fit(module, *callbacks, **{"loader": DataLoader(make_data(48), batch_size=16, shuffle=True), **settings})


def watch(callback: Callback) -> dict[str, str]:
    """What a callback has made of the fit, in words."""
    names = ("best_model_score", "stopped_epoch", "wait_count", "seen", "n_averaged")
    return {name: str(getattr(callback, name, None)) for name in names}


@pytest.mark.parametrize("name", NEIGHBOURS)
@pytest.mark.parametrize("is_first", [True, False])
def test_i1_beside_other_callbacks(name: str, is_first: bool, tmp_path: Path) -> None:
    kind, make = NEIGHBOURS[name]
    plain, paired = build(kind), build(kind)
    alone, beside = make(tmp_path / "a"), make(tmp_path / "b")
    ours = HAMUCallback(forget_loader(), FineTune(), passes=PassOptions(batchnorm="retain"))
    settings = {"enable_checkpointing": isinstance(alone, ModelCheckpoint)}
    expected_trainer, expected = fit_beside(plain, alone, **settings)
    trainer, recorded = fit_beside(paired, *([ours, beside] if is_first else [beside, ours]), **settings)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, paired.state_dict()[key]), key
    assert recorded.values == expected.values
    assert trainer.global_step == expected_trainer.global_step
    assert watch(beside) == watch(alone)


@pytest.mark.filterwarnings("ignore:StochasticWeightAveraging puts an average of the weights in the place")
def test_swa_gathers_statistics_where_batchnorm_is_frozen() -> None:
    """Its last epoch, without backward passes, is not unlearning: no forget pass, and BatchNorm thaws."""
    module, callback = build(WithBatchNorm), HAMUCallback(forget_loader(), RULE)
    fit_beside(module, callback, StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1))
    assert (callback.forget_passes, callback.combined_steps) == (6, 6)
    assert int(module.net[1].num_batches_tracked) == 3


@pytest.mark.parametrize("is_first", [True, False])
def test_finetuning_resumes(is_first: bool, tmp_path: Path) -> None:
    """The checkpoint has a parameter group that `configure_optimizers` does not make; its weights are unlearnt too."""

    def run(max_epochs: int, seed: int, **resume: Any) -> tuple[Base, Any, list[str]]:
        module = build(HeadOnly, seed=seed)
        pair: list[Any] = [HAMUCallback(forget_loader(), RULE), Unfreezes()]
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            max_epochs=max_epochs, callbacks=pair if is_first else pair[::-1], enable_checkpointing=False, **options
        )
        trainer.fit(module, DataLoader(make_data(48), batch_size=16), **resume)
        return module, trainer, pair[0].last_step.labels

    whole, _, _ = run(4, seed=5)
    run(3, seed=5)[1].save_checkpoint(tmp_path / "a.ckpt")
    again, _, labels = run(4, seed=6, ckpt_path=tmp_path / "a.ckpt")
    assert sorted(labels) == ["net.0", "net.2"]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


class Scheduled(Base):
    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "name": "mine", "interval": "step"}}


@pytest.mark.parametrize(("kind", "name"), [(Base, "lr-SGD"), (Scheduled, "mine")])
def test_learning_rate_monitor_lists_what_it_lists_without_us(kind: type[Base], name: str, tmp_path: Path) -> None:
    for callbacks in ([], [HAMUCallback(forget_loader(), RULE)]):
        monitor = LearningRateMonitor()
        fit_beside(build(kind), *callbacks, monitor, logger=CSVLogger(tmp_path))
        assert {name: set(values) for name, values in monitor.lrs.items()} == {name: {0.05}}


class Tunable(WithDropout):
    """Owns its loader, batch size and learning rate."""

    lr, batch_size = 0.05, 4

    @override
    def train_dataloader(self) -> Any:
        return DataLoader(make_data(48), batch_size=self.batch_size, shuffle=True)

    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def tune_and_fit(path: Path, finder: Callback | None, *callbacks: Callback) -> list[Any]:
    """Tune with the callback or with the Tuner, then fit; return what was found, and the weights."""
    seed_everything(1, verbose=False)
    module = build(Tunable)
    trainer = Trainer(
        max_epochs=2, callbacks=[*callbacks, *([finder] if finder else [])], accelerator="cpu", default_root_dir=path,
        logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    if finder is None:
        Tuner(trainer).lr_find(module, num_training=20)
        Tuner(trainer).scale_batch_size(module, steps_per_trial=2, max_trials=2)
    trainer.fit(module)
    return [module.lr, module.batch_size, [p.tolist() for p in module.parameters()]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: LearningRateFinder(num_training_steps=20),
        lambda: BatchSizeFinder("power", 2, max_trials=2),
    ],
    ids=["tuner", "lr", "batch size"],
)
def test_tuners_tune_plain_training(make: Callable[[], Callback | None], tmp_path: Path) -> None:
    """They put the callbacks aside; the fit that follows unlearns."""
    callback = HAMUCallback(forget_loader(), FineTune(), passes=PassOptions(batchnorm="retain"))
    expected = tune_and_fit(tmp_path, make())
    assert tune_and_fit(tmp_path, make(), callback) == expected
    assert callback.combined_steps == callback.forget_passes == 2 * math.ceil(48 / expected[1])
