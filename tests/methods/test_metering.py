"""Time, memory, and the way of a fit."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from hamu_lightning.callbacks import HAMUCallback, PassOptions
from hamu_lightning.methods import TrainingRun, _metering
from hamu_lightning.methods._evaluation import evaluate
from hamu_lightning.methods._metering import Meter, PathRecorder
from hamu_lightning.rules import HAMUQ
from tests.methods.setups import OPTIONS, build, make_split, weights_of


@pytest.mark.skipif(torch.cuda.is_available() or not _metering._STATM.exists(), reason="shows resident memory on Linux")
def test_the_peak_is_seen_after_it_is_over() -> None:
    with Meter() as small:
        time.sleep(0.03)
    with Meter() as large:
        held = torch.ones(30_000_000)  # 114 MiB
        time.sleep(0.03)
        del held
    assert large.peak > small.peak + 80  # the rest of the process may shrink meanwhile
    assert 0.03 <= small.seconds < 3


def test_memory_that_cannot_be_seen_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_metering, "_STATM", Path("does not exist"))
    with Meter() as meter:
        pass
    assert math.isnan(meter.peak)


def test_the_path_is_measured_on_all_samples_and_changes_nothing() -> None:
    source, forget = make_split()
    retain_loader, forget_loader = (DataLoader(part, batch_size=32) for part in (source.retain, forget))
    recorder = PathRecorder(retain_loader, forget_loader, every=3)
    run = TrainingRun(
        lambda forget, seed: HAMUCallback(forget, HAMUQ(1e-2), passes=PassOptions(batch_size=8), seed=seed), OPTIONS
    )
    module = build(batchnorm=True)
    result = run.observed_by(recorder)(module, source, forget)
    assert torch.equal(weights_of(result), weights_of(run(module, source, forget)))
    # Two epochs of four batches.
    assert [step for step, *_ in recorder.path] == [0, 3, 6, 8]
    for (_, *losses), end in ((recorder.path[0], module), (recorder.path[-1], result)):
        assert losses == [evaluate(end, retain_loader).loss, evaluate(end, forget_loader).loss]
    assert recorder.seconds > 0
