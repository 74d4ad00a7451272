"""What HAMUCallback refuses, what it notices in the middle of a fit, and what it warns about."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader, IterableDataset, Subset
from typing_extensions import override

from hamu_lightning import HAMUCallback, split_forget
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.errors import HAMUError, HAMUStateError, HAMUValueError
from hamu_lightning.rules import FineTune
from tests.callbacks.modules import Base, WithBatchNorm, build, fit, make_data
from tests.callbacks.setups import RULE, Manual, forget_data

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


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


class SkipsByNumber(Base):
    """Of every second batch it wants no loss."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("goal", [{"rule": FineTune()}, {"target": 3.0}])
def test_batches_are_skipped_by_their_number(goal: dict[str, Any], accumulation: int) -> None:
    """Both batches of a pair are, and the weights are those of a plain fit."""
    plain, ours = build(SkipsByNumber), build(SkipsByNumber)
    fit(plain, accumulate_grad_batches=accumulation)
    callback = HAMUCallback(DataLoader(forget_data(), batch_size=8), passes=PassOptions(batchnorm="retain"), **goal)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The fit has ended before the target")
        fit(ours, callback, accumulate_grad_batches=accumulation)
    assert (callback.combined_steps, callback.forget_passes) == (6, 6)
    if "rule" in goal:
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_window_of_which_one_half_is_skipped_is_the_other_half() -> None:
    gramians = []
    for accumulation in (1, 2):
        callback = HAMUCallback(DataLoader(forget_data(), batch_size=8), RULE)
        fit(build(SkipsByNumber), callback, accumulate_grad_batches=accumulation, max_steps=1)
        assert callback.last_step is not None
        gramians.append(callback.last_step.gramian)
    torch.testing.assert_close(*gramians)


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
        ({"batchnorm": "eval"}, "Expected `batchnorm` to be one of 'freeze', 'retain'"),
        ({"every_n_steps": 0}, "Expected `every_n_steps` to be at least 1"),
        ({"batch_size": 0}, "Expected `batch_size` to be at least 1"),
        ({"groups_per_step": 0}, "Expected `groups_per_step` to be at least 1"),
    ],
)
def test_bad_pass_options(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        PassOptions(**arguments)


def test_shared_samples_are_warned_about() -> None:
    data = make_data()
    retain, forget = split_forget(data, range(10))
    with pytest.warns(UserWarning, match="share 10 samples of one Dataset"):
        fit(build(Base), HAMUCallback(forget, RULE), loader=DataLoader(data, batch_size=16))
    fit(build(Base), HAMUCallback(forget, RULE), loader=DataLoader(retain, batch_size=16))  # a warning is an error
