"""HAMUCallback on small modules: sources, settings, what it logs, and that everything is taken back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, HAMUOptimizer
from hamu_lightning.callbacks import PassOptions, StepOptions
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.rules import FineTune, FixedRadius
from tests.callbacks.modules import Base, WithBatchNorm, build, fit, make_data
from tests.callbacks.setups import RULE, Manual, forget_data

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


def loss_on(module: Base, data: TensorDataset) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module(data.tensors[0]), data.tensors[1]))


def test_the_forget_loss_rises() -> None:
    module = build(Base)
    before = loss_on(module, forget_data())
    callback = HAMUCallback(
        forget_data(), RULE, passes=PassOptions(batch_size=40)
    )  # the whole set: each step's promise is about all of it
    fit(module, callback)
    # 12 steps that promise 0.02 each; half of that leaves room for second-order terms.
    assert loss_on(module, forget_data()) > before + 0.12
    assert callback.combined_steps == callback.forget_passes == 12


class OwnsForgetData(Base):
    def forget_dataloader(self) -> DataLoader[Any]:
        return DataLoader(forget_data(), batch_size=16)


def paired_loader() -> CombinedLoader:
    loaders = {"retain": DataLoader(make_data(), batch_size=16), "forget": DataLoader(forget_data(), batch_size=16)}
    return CombinedLoader(loaders, "max_size_cycle")


@pytest.mark.parametrize("source", ["loader", "dataset", "list", "hook", "paired"])
def test_sources_of_forget_batches(source: str) -> None:
    """All five give the same first step: the forget batches come in the same order."""
    module = build(OwnsForgetData if source == "hook" else Base)
    loader = DataLoader(forget_data(), batch_size=16)
    forget = {"loader": loader, "list": list(loader), "dataset": forget_data()}.get(source)
    callback = HAMUCallback(forget, RULE)
    train = paired_loader() if source == "paired" else DataLoader(make_data(), batch_size=16)
    fit(module, callback, loader=train, max_steps=1)
    reference = build(Base)
    fit(reference, HAMUCallback(loader, RULE), loader=DataLoader(make_data(), batch_size=16), max_steps=1)
    same = all(torch.equal(a, b) for a, b in zip(module.parameters(), reference.parameters(), strict=True))
    assert same == (source != "dataset")  # a dataset is shuffled
    assert callback.combined_steps == 1


def test_logged_names_and_progress_bar(tmp_path: Path) -> None:
    module = build(WithBatchNorm)
    callback = HAMUCallback(forget_data(), RULE, progress_bar=True)
    trainer, _ = fit(module, callback, logger=CSVLogger(tmp_path))
    expected = {
        *(f"hamu/{n}" for n in ("kappa", "cosine", "quota", "radius", "forget_improvement", "retain_improvement")),
        *(f"hamu/{n}" for n in ("feasible_improvement", "margin", "direct", "rectified", "infeasible", "skipped")),
        *("retain/loss", "forget/loss", "forget/accuracy", "forget/a", "forget/b", "a", "accuracy"),
    }
    assert expected <= set(trainer.callback_metrics)
    assert {"forget/loss", "hamu/margin"} <= set(trainer.progress_bar_metrics)
    assert float(trainer.callback_metrics["hamu/quota"]) == pytest.approx(0.02)
    assert float(trainer.callback_metrics["hamu/forget_improvement"]) >= 0.02 * (1 - 1e-6)
    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert "hamu/kappa" in lines[0]


def test_exact_steps_and_actual_improvements() -> None:
    """With AdamW as the base; a warning would be an error."""
    callback = HAMUCallback(forget_data(), RULE, steps=StepOptions(exact=True, track_actual=True))
    trainer, _ = fit(build(Base, "adamw"), callback)
    logged = trainer.callback_metrics
    for name in ("forget", "retain"):
        # The weights are float32.
        torch.testing.assert_close(
            logged[f"hamu/actual_{name}_improvement"], logged[f"hamu/{name}_improvement"], rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("mode", ["freeze", "retain"])
def test_batchnorm(mode: Any) -> None:
    module = build(WithBatchNorm)
    before = module.net[1].running_mean.clone()
    modes: list[bool] = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            modes.append(pl_module.net[1].training)

    fit(module, HAMUCallback(forget_data(), RULE, passes=PassOptions(batchnorm=mode)), Look())
    assert modes == [mode == "retain"] * 12
    assert torch.equal(before, module.net[1].running_mean) == (mode == "freeze")
    assert module.net[1].training  # as it was found


def test_every_n_steps() -> None:
    callback = HAMUCallback(forget_data(), RULE, passes=PassOptions(every_n_steps=3))
    fit(build(Base), callback)
    assert (callback.combined_steps, callback.forget_passes) == (4, 4)


def test_accumulation_is_the_step_of_the_joint_batch() -> None:
    """Windows of 4 micro-batches, the last one of 2, give the steps of batches of 64 and 32."""

    def run(batch: int, accumulation: int) -> Base:
        module = build(Base).double()
        data = TensorDataset(make_data().tensors[0].double(), make_data().tensors[1])
        forget = TensorDataset(*(t[:96] for t in (make_data(96, 7).tensors[0].double(), make_data(96, 7).tensors[1])))
        callback = HAMUCallback(DataLoader(forget, batch_size=batch), RULE)
        fit(module, callback, loader=DataLoader(data, batch_size=batch), accumulate_grad_batches=accumulation)
        assert callback.combined_steps == 4
        return module

    for a, b in zip(run(64, 1).parameters(), run(16, 4).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)  # float64 sums in another order, over four steps


def test_clipping_applies_to_each_objective() -> None:
    norms: list[tuple[Tensor, Tensor]] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            gramian = callback.last_step.gramian.sum(0)  # type: ignore[union-attr]
            norms.append((gramian[0, 0].sqrt(), gramian[1, 1].sqrt()))

    callback = HAMUCallback(forget_data(), RULE)
    fit(build(Base), callback, Look(), gradient_clip_val=0.05)
    assert all(n <= 0.05 * (1 + 1e-5) for pair in norms for n in pair)
    assert any(n > 0.05 * (1 - 1e-3) for _, n in norms)


@pytest.mark.parametrize(
    ("reason", "rule"),
    [
        ("infeasible", HAMUQ(1e3, radius=FixedRadius(1e-3))),
        ("collateral_damage", HAMUQ(1e3, radius=FixedRadius(1e-3))),
    ],
)
def test_stops_with_a_reason_and_keeps_the_model(reason: Any, rule: HAMUQ, tmp_path: Path) -> None:
    module = build(Base)
    before = copy.deepcopy(module.state_dict())
    checkpoint = ModelCheckpoint(tmp_path)
    callback = HAMUCallback(forget_data(), rule, stop_on=[reason])
    trainer, _ = fit(module, callback, checkpoint, enable_checkpointing=True)
    assert trainer.global_step == 1
    assert callback.stop_reason is not None
    assert callback.stop_reason.startswith(reason.replace("_", " "))
    # The step that was judged is not applied; the model reached is saved although the epoch had not ended.
    saved = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(before[name], saved[name]) for name in before)


def test_everything_is_taken_back_after_the_fit() -> None:
    module = build(Base)
    callback = HAMUCallback(forget_data(), RULE)
    trainer, _ = fit(module, callback)
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    assert "training_step" not in vars(trainer.strategy)
    plain, again = build(Base), build(Base)
    fit(plain)
    again.load_state_dict(build(Base).state_dict())
    trainer.callbacks.remove(callback)
    fit(again)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))
    assert callback.last_step is not None


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_in_the_middle_of_a_fit(copier: Any) -> None:
    copies: list[HAMUCallback] = []

    class Copy(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            copies.append(copier(callback))

    callback = HAMUCallback(forget_data(), RULE)
    fit(build(Base), callback, Copy())
    assert copies[3].combined_steps == 4
    fit(build(Base), HAMUCallback(**{"forget": forget_data(), "rule": copies[0].settings.rule}))


def test_manual_optimization_with_the_optimizer() -> None:
    module = build(Manual)
    before = loss_on(module, forget_data())
    trainer, _ = fit(module, max_steps=4)
    assert trainer.optimizers[0].steps == 4
    assert loss_on(module, forget_data()) > before


def test_own_hamu_optimizer_is_used_with_its_rule() -> None:
    class Own(Base):
        @override
        def configure_optimizers(self) -> Any:
            return HAMUOptimizer(torch.optim.SGD(self.parameters(), lr=0.05), FineTune())

    module = build(Own)
    trainer, _ = fit(module, HAMUCallback(forget_data()))
    assert isinstance(trainer.optimizers[0], HAMUOptimizer)
    assert isinstance(trainer.optimizers[0].base, torch.optim.SGD)


def test_fabric_wraps_the_optimizer() -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    model, optimizer = fabric.setup(
        module, HAMUOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), HAMUQ(0.05, radius=FixedRadius(0.1)))
    )
    before = module.weight.detach().clone()
    for _ in range(2):
        with optimizer.retain():
            fabric.backward(model(torch.ones(2, 4)).square().sum())
        with optimizer.forget():
            fabric.backward(model(torch.eye(4)).sum())
        optimizer.step()
    assert optimizer.steps == 2
    assert not torch.equal(before, module.weight)
    with pytest.raises(HAMUStateError, match="are missing"):
        optimizer.step()
