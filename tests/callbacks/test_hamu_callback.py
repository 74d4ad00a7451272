"""HAMUCallback: where forget batches come from, what is logged, when it stops, what it refuses, what it gives back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, HAMUOptimizer, split_forget
from hamu_lightning.callbacks import PassOptions, StepOptions
from hamu_lightning.errors import HAMUError, HAMUStateError, HAMUValueError
from hamu_lightning.rules import FineTune, FixedRadius, RelativeRadius
from tests.callbacks.modules import Base, WithBatchNorm, build, fit, make_data

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")
RULE = HAMUQ(0.02, radius=RelativeRadius(0.05))


def forget_data() -> TensorDataset:
    return make_data(40, seed=9)


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


class ReturnsNone(Base):
    """Skips batches by the sign of their first number; `skips` says which."""

    skips = "some"

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        is_forget = batch[0].shape[0] == 8
        if self.skips == "forget" and is_forget:
            return None
        if self.skips == "retain" and not is_forget and batch_idx % 2:
            return None
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_training_step_returns_none() -> None:
    module = build(ReturnsNone)
    module.skips = "retain"
    callback = HAMUCallback(DataLoader(forget_data(), batch_size=8), RULE)
    fit(module, callback)
    assert (callback.combined_steps, callback.left_out_steps, callback.forget_passes) == (6, 6, 12)
    module = build(ReturnsNone)
    module.skips = "forget"
    with pytest.raises(HAMUStateError, match="returned None for a full pass"):
        fit(module, HAMUCallback(DataLoader(forget_data(), batch_size=8), RULE))


class Breaks(WithBatchNorm):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        if len(batch[0]) == 8 and self.accuracy.update_count > 3:
            raise ZeroDivisionError("a bad batch")
        return output


def test_exception_in_the_forget_pass_leaves_everything_as_it_was() -> None:
    module = build(Breaks)
    callback = HAMUCallback(DataLoader(forget_data(), batch_size=8), RULE)
    with pytest.raises(ZeroDivisionError, match="a bad batch"):
        fit(module, callback)
    assert module.net[1].training
    assert type(module.trainer.optimizers[0]) is torch.optim.SGD
    assert "training_step" not in vars(module.trainer.strategy)
    assert module.accuracy.update_count == 3
    # zero_grad() of the fourth step has not run: what is there is the retain gradient of the third.
    assert all(p.grad is not None for p in module.net.parameters())


class StepsByItself(Base):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.data.add_(0.01)
        return super().training_step(batch, batch_idx)

    @override
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()


def test_watchdog_notices_weights_that_move_without_us() -> None:
    with pytest.raises(HAMUStateError, match="they moved before its first step"):
        fit(build(StepsByItself), HAMUCallback(forget_data(), RULE))


class NeverSteps(Base):
    @override
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()


def test_forgetting_never_silently_does_not_happen() -> None:
    with pytest.raises(HAMUStateError, match="it ended with 0 combined steps"):
        fit(build(NeverSteps), HAMUCallback(forget_data(), RULE))


class Manual(Base):
    """The recipe that the refusal of manual optimization gives."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.forget = next(iter(DataLoader(forget_data(), batch_size=40)))

    def before_step(self, optimizer: Any) -> None:
        pass

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        with optimizer.retain():
            self.manual_backward(super().training_step(batch, batch_idx))
        with optimizer.forget():
            self.manual_backward(super().training_step(self.forget, batch_idx))
        self.before_step(optimizer)
        optimizer.step()
        assert optimizer.last_step is not None

    @override
    def configure_optimizers(self) -> Any:
        return HAMUOptimizer(torch.optim.SGD(self.parameters(), lr=0.05), RULE)


def test_manual_optimization_with_the_optimizer() -> None:
    module = build(Manual)
    before = loss_on(module, forget_data())
    trainer, _ = fit(module, max_steps=4)
    assert trainer.optimizers[0].steps == 4
    assert loss_on(module, forget_data()) > before


class TwoOptimizers(Base):
    @override
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]


class UsesLBFGS(Base):
    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class FetchesItself(Base):
    @override
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        return super().training_step(*next(dataloader_iter)[:2])


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Manual, {}, "Expected automatic optimization.*with optimizer.retain"),
        (UsesLBFGS, {}, "but got LBFGS"),
        (FetchesItself, {}, "but it takes `dataloader_iter`"),
        (Base, {"rule": None}, "Expected `rule`, such as"),
        (Base, {"forget": None}, "Expected to find the data of 'forget'"),
        (Base, {"forget": []}, "but the list is empty"),
        (Base, {"forget": Subset(forget_data(), [])}, "but the Subset is empty"),
        (Base, {"forget": DataLoader(forget_data(), 64, drop_last=True)}, "but the DataLoader is empty"),
        (Base, {"forget": [1], "passes": PassOptions(batch_size=3)}, "Expected `batch_size` to go with a Dataset"),
        (Base, {"forget": 3}, "Expected the data of 'forget' to be a DataLoader"),
    ],
)
def test_refusals_come_before_the_first_batch(kind: Any, arguments: dict[str, Any], message: str) -> None:
    module = build(kind)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match=f"(?s){message}") as caught:
        fit(module, HAMUCallback(**{"forget": forget_data(), "rule": RULE, **arguments}))
    assert isinstance(caught.value, HAMUError)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy"])
def test_strategies_that_hide_gradients_are_refused(name: str) -> None:
    """By name, since most cannot be made here: the user's subclass of one counts as well."""
    parent = type(name, (SingleDeviceStrategy,), {})
    strategy = type("Own", (parent,), {})(device=torch.device("cpu"))
    with pytest.raises(MisconfigurationException, match=f"but {name} .*ModelParallelStrategy"):
        fit(build(Base), HAMUCallback(forget_data(), RULE), strategy=strategy)


def test_two_callbacks_are_refused() -> None:
    """By Lightning, as both have one place in a checkpoint; by us where one comes later."""
    first, second = HAMUCallback(forget_data(), RULE), HAMUCallback(forget_data(), RULE)
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `HAMUCallback`"):
        fit(build(Base), first, second)

    class Adds(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            trainer.callbacks.append(second)

    with pytest.raises(MisconfigurationException, match="Trainer has several. Give all samples to forget to one"):
        fit(build(Base), Adds(), first)


def test_an_empty_stream_is_noticed_at_its_first_batch() -> None:
    with pytest.raises(HAMUStateError, match="a pass over it yielded none"):
        fit(build(Base), HAMUCallback(DataLoader(Empty()), RULE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": 0.1}, "Expected `rule` to be a rule"),
        ({"stop_on": ["boredom"]}, "Expected `stop_on` to hold some of"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        HAMUCallback(forget_data(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batchnorm": "eval"}, "Expected `batchnorm` to be 'freeze' or 'retain'"),
        ({"every_n_steps": 0}, "Expected `every_n_steps` to be at least 1"),
        ({"batch_size": 0}, "Expected `batch_size` to be at least 1"),
        ({"groups_per_step": 0}, "Expected `groups_per_step` to be at least 1"),
    ],
)
def test_bad_pass_options(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        PassOptions(**arguments)


def test_own_hamu_optimizer_is_used_with_its_rule() -> None:
    class Own(Base):
        @override
        def configure_optimizers(self) -> Any:
            return HAMUOptimizer(torch.optim.SGD(self.parameters(), lr=0.05), FineTune())

    module = build(Own)
    trainer, _ = fit(module, HAMUCallback(forget_data()))
    assert isinstance(trainer.optimizers[0], HAMUOptimizer)
    assert isinstance(trainer.optimizers[0].base, torch.optim.SGD)


def test_shared_samples_are_warned_about() -> None:
    data = make_data()
    retain, forget = split_forget(data, range(10))
    with pytest.warns(UserWarning, match="share 10 samples of one Dataset"):
        fit(build(Base), HAMUCallback(forget, RULE), loader=DataLoader(data, batch_size=16))
    fit(build(Base), HAMUCallback(forget, RULE), loader=DataLoader(retain, batch_size=16))  # a warning is an error


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
