"""How many tensors of the size of the logits live at once: at most one more than for the module's own loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from hamu_lightning.objectives import (
    CEU,
    DELETE,
    DPO,
    NPO,
    RMU,
    UNDIAL,
    WGA,
    BadTeacher,
    BatchPass,
    Calibration,
    CrossEntropy,
    EntropyWeighted,
    FrozenCopy,
    Objective,
    RandomLabels,
    ReferenceKL,
    RMURetain,
    SatImp,
    SecondAnswer,
    SimNPO,
    TokenCap,
    UniformLabels,
    UnseenAnswer,
    _rows,
)

SAMPLES, PLACES, CLASSES = 4, 64, 512
# 64 pieces, of which an objective has a few at once: about a tenth.
SLACK = 0.25


class Live(TorchDispatchMode):
    """Sums up the storages that live, and keeps the largest sum, in tensors of the logits' size."""

    def __init__(self, unit: int) -> None:
        super().__init__()
        self._unit, self._known, self.peak = unit, dict[int, tuple[StorageWeakRef, int]](), 0.0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._known.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self._known = {key: known for key, known in self._known.items() if not known[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._known.values()) / self._unit)
        return result


class Model(nn.Module):
    """Causal, with few weights and large logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Embedding(16, 2), nn.Linear(2, CLASSES, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.body(input_ids))


def unseen(reference: FrozenCopy) -> Objective:
    calibration, labels = Calibration(), torch.arange(16)
    sets = (torch.randn(16), labels), (torch.randn(16), labels)
    calibration.fit(*sets, torch.ones(CLASSES))
    return UnseenAnswer(calibration, reference=reference)


CASES: dict[str, Callable[[Any], Objective]] = {
    "cross-entropy": lambda r: CrossEntropy(),
    "NPO": lambda r: NPO(reference=r),
    "SimNPO": lambda r: SimNPO(),
    "DPO": lambda r: DPO(lambda b: b, reference=r),
    "KL": lambda r: ReferenceKL(r),
    "KL, reverse": lambda r: ReferenceKL(r, direction="reverse"),
    "UNDIAL": lambda r: UNDIAL(reference=r),
    "DELETE": lambda r: DELETE(reference=r),
    "bad teacher": lambda r: BadTeacher(r._given),
    "uniform": lambda r: UniformLabels(),
    "random labels": lambda r: RandomLabels(),
    "RMU": lambda r: RMU("body", 1.0),
    "RMU, retain": lambda r: RMURetain("body", reference=r),
    "WGA": lambda r: WGA(),
    "SatImp": lambda r: SatImp(),
    "token cap": lambda r: TokenCap(),
    "entropy": lambda r: EntropyWeighted(),
    "CE-U": lambda r: CEU(),
    "second answer": lambda r: SecondAnswer(reference=r),
    "unseen": unseen,
}


def measure(make: Callable[[], Tensor]) -> float:
    with Live(SAMPLES * PLACES * CLASSES * 4) as live:
        make().backward()
    return live.peak


@pytest.fixture(scope="module")
def own() -> float:
    """The module's own loss, as transformers takes it."""
    model, ids = Model(), torch.ones(SAMPLES, PLACES, dtype=torch.int64)
    return measure(lambda: cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten()))


@pytest.mark.parametrize("name", CASES)
def test_one_tensor_more_than_the_loss_at_most(name: str, own: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "_FEW", 0)  # in pieces, however few logits there are
    model, ids = Model(), torch.ones(SAMPLES, PLACES, dtype=torch.int64)
    objective, batch = CASES[name](FrozenCopy(Model())), {"input_ids": ids, "labels": ids}
    found = measure(lambda: objective(BatchPass(model, batch)))
    assert found < own + 1
    # Without a second model that is asked: the logits and their gradient.
    assert found < 2 + SLACK or hasattr(objective, "reference") or name == "bad teacher"
