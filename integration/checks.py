"""The two invariants for models of other projects, which build their Trainer themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from hamu_lightning import HAMUCallback
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.callbacks.passes import ForgetPass, copied
from hamu_lightning.rules import FineTune
from tests.callbacks.modules import Recorder
from tests.callbacks.passes.test_invariants import GradientsAreEqual, SameRandomState

# Seeds, builds a new model, trains it with these callbacks, and returns its LightningModule.
Run = Callable[[list[Any]], torch.nn.Module]


def check_no_trace(run: Run, forget: Iterable[Any]) -> None:
    """I1: with FineTune a run is bit-identical to plain training: weights, buffers and every logged value."""
    expected, recorded = Recorder(), Recorder()
    plain = run([expected])
    callback = HAMUCallback(forget, FineTune(), passes=PassOptions(batchnorm="retain"))
    paired = run([callback, recorded])
    assert callback.combined_steps > 1
    assert plain.state_dict().keys() == paired.state_dict().keys()
    assert [n for n, v in plain.state_dict().items() if not _is_same(v, paired.state_dict()[n])] == []
    assert recorded.values == expected.values


def check_self_cancellation(run: Run, forget: Iterable[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """I2: given the retain batch and its random state, the forget pass has the retain gradient bit for bit."""
    monkeypatch.setattr("hamu_lightning.callbacks._group.RandomStream", SameRandomState)
    monkeypatch.setattr(ForgetPass, "_next_batch", lambda self, retain: copied(retain))
    check = GradientsAreEqual()
    run([HAMUCallback(forget, FineTune(), passes=PassOptions(batchnorm="retain")), check])
    assert check.steps > 1


def _is_same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)
