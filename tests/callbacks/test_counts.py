"""What a step in a fit costs in numbers that do not depend on the machine: what is read, and what is copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, VerifySteps
from hamu_lightning.callbacks.passes import _forget_pass
from hamu_lightning.optim import _engine
from hamu_lightning.rules import FixedRadius, RelativeQuota
from tests.callbacks.modules import Base, build, fit, make_data

GENTLE = HAMUQ(RelativeQuota(0.3), radius=FixedRadius(0.01))


READS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.numpy, Tensor.cpu}


class Reads(TorchFunctionMode):
    """Counts numbers of tensors that are read: on an accelerator each waits until all is done that it was asked."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READS
        return func(*args, **(kwargs or {}))


class PerStep(Callback):
    """What a counter has counted at the end of each batch; ends the fit after 30 steps of many."""

    def __init__(self, reads: Reads) -> None:
        self.reads, self.counts = reads, [0]

    @override
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.counts.append(self.reads.count)
        trainer.should_stop = trainer.global_step == 30

    @property
    def added(self) -> list[int]:
        return [b - a for a, b in zip(self.counts, self.counts[1:], strict=False)]


def loader(batches: int, seed: int = 0) -> DataLoader[Any]:
    return DataLoader(make_data(8 * batches, seed), batch_size=8)


def count_reads(*callbacks: Callback) -> list[int]:
    """In each step; logged are the first one and the last one."""
    with Reads() as reads:
        per_step = PerStep(reads)
        fit(build(Base), *callbacks, per_step, loader=loader(40), max_epochs=40, log_every_n_steps=1000)
    return per_step.added


def test_nothing_is_read_in_a_step_that_is_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the way that steps take on an accelerator; the guard over the module reads in its first looks alone."""
    monkeypatch.setattr(_engine, "make_host_plan", lambda layout: None)
    plain, ours = count_reads(), count_reads(HAMUCallback(loader(40, seed=9), GENTLE))
    assert ours[4:29] == plain[4:29]


def test_the_counter_sees_reads() -> None:
    with Reads() as reads:
        float(torch.ones(()))
        bool(torch.ones(()) > 0)
        torch.ones(2).tolist()
    assert reads.count == 3


@pytest.mark.parametrize(("verify", "copies"), [(None, 0), (VerifySteps(), 12 * 4), (VerifySteps(every=4), 3 * 4)])
def test_batches_are_copied_only_to_be_run_again(verify: Any, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two to keep, and two of these to run: a module may edit them."""
    from hamu_lightning.callbacks.goals import _verification

    count, original = [0], _forget_pass.copied

    def copied(batch: Any) -> Any:
        count[0] += 1
        return original(batch)

    monkeypatch.setattr(_forget_pass, "copied", copied)
    monkeypatch.setattr(_verification, "copied", copied)
    hamu = HAMUCallback(loader(3, seed=9), GENTLE, verify=verify)
    fit(build(Base), hamu, loader=loader(12), max_epochs=1)
    assert count[0] == copies
