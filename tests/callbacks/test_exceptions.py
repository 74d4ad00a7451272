"""An exception in the forget pass: nothing is lost, the user sees the original error. And what comes after a fit."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.rules import FineTune, FixedRadius
from tests.callbacks.modules import Recorder, WithBatchNorm, build, fit, make_data
from tests.callbacks.passes.test_invariants import forget_loader

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")
RULE = HAMUQ(0.02, radius=FixedRadius(0.05))


class Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ZeroDivisionError("in backward")


class Fails(WithBatchNorm):
    """Fails in its forget pass, the one with batches of 8, in the second half of the second window."""

    where = ""

    def fails(self, where: str, batch: Any) -> bool:
        return self.where == where and len(batch[0]) == 8 and self.trainer.fit_loop.epoch_loop.batch_idx == 3

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.fails("transfer", batch):
            raise ZeroDivisionError("in transfer")
        return batch

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        self.history = [*getattr(self, "history", []), float(output["loss"].detach())]
        if self.fails("forward", batch):
            raise ZeroDivisionError("in forward")
        if self.fails("interrupt", batch):
            raise KeyboardInterrupt
        if self.fails("backward", batch):
            output["loss"] = Explodes.apply(output["loss"])
        return output


class BadSample(Dataset[Any]):
    def __init__(self, crashes: bool = False) -> None:
        self.data, self.crashes = make_data(40, seed=9), crashes

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        if index == 27:  # in the fourth batch of 8
            if self.crashes:
                os._exit(1)
            raise ZeroDivisionError("in loader")
        return self.data[index]


class Witness(Callback):
    """Compares what there is after the exception with what there was before the forget pass."""

    is_checked = False

    @staticmethod
    def look(trainer: Trainer, module: Any) -> dict[str, Any]:
        loop = trainer.fit_loop.epoch_loop
        return {
            "grad": [p.grad for p in module.parameters()],
            "grad values": [p.grad.tolist() for p in module.parameters() if p.grad is not None],
            "results": loop._results,
            "logged": str(dict(loop._results)),
            "batch": loop._results.batch,
            "metric": (module.accuracy.update_count, str(module.accuracy.metric_state)),
            "buffers": [b.tolist() for b in module.buffers()],
            "history": list(getattr(module, "history", [])),
            "random": torch.get_rng_state().tolist(),
            "callbacks": list(trainer.callbacks),  # type: ignore[attr-defined]
        }

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.before = self.look(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        after = self.look(trainer, pl_module)
        for before, now in zip(self.before.pop("grad"), after.pop("grad"), strict=True):
            assert before is now
        assert self.before.pop("results") is after.pop("results")
        assert self.before.pop("batch") is after.pop("batch")
        assert self.before == after
        self.is_checked = True


def assert_taken_back(module: Any) -> None:
    assert all(m.training for m in module.modules())
    assert type(module.trainer.optimizers[0]) is torch.optim.SGD
    assert "training_step" not in vars(module.trainer.strategy)
    module.where = ""
    fit(module)


@pytest.mark.parametrize("where", ["loader", "worker", "transfer", "forward", "backward"])
@pytest.mark.parametrize("batchnorm", ["freeze", "retain"])
def test_nothing_is_lost(where: str, batchnorm: Any) -> None:
    module, witness = build(Fails), Witness()
    module.where = where
    data = BadSample() if where in ("loader", "worker") else make_data(40, seed=9)
    forget = DataLoader(data, batch_size=8, num_workers=int(where == "worker"))
    callback = HAMUCallback(forget, RULE, passes=PassOptions(batchnorm=batchnorm))
    with pytest.raises(ZeroDivisionError, match="in loader" if where == "worker" else f"in {where}"):
        fit(module, witness, callback, accumulate_grad_batches=2)
    assert witness.is_checked
    assert_taken_back(module)


def test_keyboard_interrupt() -> None:
    """Lightning ends the process in an orderly way, with status 1; a notebook goes on with the module."""
    module, witness, handler = build(Fails), Witness(), signal.getsignal(signal.SIGINT)
    module.where = "interrupt"
    try:
        with pytest.raises(SystemExit):
            fit(module, witness, HAMUCallback(DataLoader(make_data(40), batch_size=8), RULE), accumulate_grad_batches=2)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores the signal from then on
    assert witness.is_checked
    assert_taken_back(module)


def test_crashing_worker() -> None:
    module, forget = build(Fails), DataLoader(BadSample(crashes=True), batch_size=8, num_workers=1)
    # Which of the two depends on where torch notices it.
    with pytest.raises((RuntimeError, ConnectionResetError), match="exited unexpectedly|reset by peer"):
        fit(module, HAMUCallback(forget, RULE))
    assert_taken_back(module)


class Everything(WithBatchNorm):
    """Has all four stages."""

    @override
    def val_dataloader(self) -> Any:
        return DataLoader(make_data(32, seed=3), batch_size=16)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", cross_entropy(self(batch[0]), batch[1]))

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])  # type: ignore[no-any-return]


def go_on(module: Everything, callback: HAMUCallback | None, keeps: bool) -> list[Any]:
    """Fit, validate, test, predict, and fit again; return what came of it, in numbers."""
    trainer, recorder = fit(module, *([callback] if callback else []))
    data = module.val_dataloader()
    outcomes = [trainer.validate(module, verbose=False), trainer.test(module, data, verbose=False)]
    outcomes += [p.tolist() for p in trainer.predict(module, data)]  # type: ignore[union-attr]
    if callback and not keeps:
        trainer.callbacks.remove(callback)  # type: ignore[attr-defined]
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, DataLoader(make_data(), batch_size=16, shuffle=True))
    assert isinstance(recorder, Recorder)
    return [outcomes, recorder.values, [p.tolist() for p in module.state_dict().values()]]


@pytest.mark.parametrize("keeps", [True, False])
def test_what_comes_after_a_fit(keeps: bool) -> None:
    """As without us; and the second fit with the callback goes on where the first has ended."""
    callback = HAMUCallback(forget_loader(), FineTune(), passes=PassOptions(batchnorm="retain"))
    assert go_on(build(Everything), callback, keeps) == go_on(build(Everything), None, keeps)
    assert callback.combined_steps == callback.forget_passes == (24 if keeps else 12)
