"""BatchNorm statistics on several processes: those of a plain run, whichever passes there are between."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hamu_lightning import HAMUCallback
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.rules import FineTune
from tests.callbacks.modules import WithBatchNorm, build, fit, make_data
from tests.distributed import run_ranks


def train_on_ranks(rank: int) -> list[list[Tensor]]:
    from lightning.pytorch.strategies import DDPStrategy

    warnings.simplefilter("ignore")
    ends = []
    for has_forget in (False, True):
        module: Any = build(WithBatchNorm)
        forget = DataLoader(make_data(40, seed=9), batch_size=8)
        hamu = HAMUCallback(forget, FineTune(), passes=PassOptions(batchnorm="retain"))
        strategy = DDPStrategy(process_group_backend="gloo")
        fit(module, *([hamu] if has_forget else []), strategy=strategy, devices=2, accumulate_grad_batches=2)
        ends.append([buffer.detach().clone() for buffer in module.buffers()])
    return ends


def test_statistics_of_each_process_are_those_of_a_plain_run() -> None:
    for plain, unlearned in run_ranks(train_on_ranks, 2):
        assert all(torch.equal(a, b) for a, b in zip(plain, unlearned, strict=True))
