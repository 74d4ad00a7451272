"""Requests of both kinds for `Unseen`, and what is refused, before the first step."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUCallback, Holdout, SecondChoice, Unseen, split_forget
from hamu_lightning.errors import HAMUError, HAMUValueError
from hamu_lightning.objectives import NPO
from hamu_lightning.rules import RelativeRadius
from hamu_lightning.solvers import FeasibleDirection
from tests.callbacks.goals.test_unseen import CLASS, HELD_OUT, RETAIN, SAMPLES, TRAIN, end_of, trained, unlearn
from tests.callbacks.modules import Base, build, fit

pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches", "ignore:The fit has ended before the target"
)


def test_samples_and_whole_classes_end_each_at_its_own_end() -> None:
    """Two groups; in one set they are refused: the nats of a class would pay for the samples'."""
    rest, forget = split_forget(TRAIN, (TRAIN.tensors[1] == CLASS) | (torch.arange(120) < 24))
    classes = Subset(TRAIN, [i for i in forget.indices if TRAIN.tensors[1][i] == CLASS])
    samples = Subset(TRAIN, [i for i in forget.indices if TRAIN.tensors[1][i] != CLASS])
    module, original = trained(), trained()
    with pytest.raises(HAMUError, match="Make two groups of them: HAMUCallback"):
        unlearn(module, forget, Unseen(HELD_OUT), rest)
    targets = {"classes": Unseen(), "samples": Unseen(HELD_OUT)}
    rule = HAMUCallback({"classes": classes, "samples": samples}, target=targets).settings.rule
    assert isinstance(rule, FeasibleDirection) and rule.radius == RelativeRadius(2e-3)
    hamu = HAMUCallback(
        {"classes": classes, "samples": samples}, replace(rule, radius=RelativeRadius(0.005)), verify=False
    )
    fit(module, hamu, loader=DataLoader(rest, batch_size=72), max_epochs=90)
    for target, data in ((targets["classes"], classes), (targets["samples"], samples)):
        came, end = end_of(module, original, target, data)
        assert 0.9 * end <= came <= end
    with pytest.raises(HAMUValueError, match="Expected a target of its own for each group"):
        HAMUCallback({"a": classes, "b": samples}, target=dict.fromkeys("ab", targets["samples"]))


@pytest.mark.parametrize("are_labels_named", [True, False])
def test_protected_classes_stay(are_labels_named: bool) -> None:
    """A class that is in no other loader is not one that goes."""
    kept, protected, gone = (Subset(TRAIN, (TRAIN.tensors[1] == c).nonzero().flatten().tolist()) for c in range(3))
    forget: Any = gone if are_labels_named else [next(iter(DataLoader(gone, batch_size=len(gone))))]
    hamu = HAMUCallback({"class": forget}, protect={"like it": protected}, target={"class": (target := Unseen())})
    with pytest.warns(UserWarning, match="The fit has ended before the target"):
        fit(trained(), hamu, loader=DataLoader(kept, batch_size=16), max_steps=1)
    assert target.objective.calibration.goes(torch.device("cpu")).tolist() == [False, False, True]


class Regression(Base):
    def make_net(self) -> nn.Module:
        return nn.Linear(10, 1)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.mse_loss(self(batch[0]), batch[1])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(RETAIN)


LESS, MORE, NEW = (TensorDataset(torch.randn(n, 10), torch.randn(n, 1)) for n in (10, 20, 20))
OUTSIDE = TensorDataset(torch.randn(30, 10), torch.randint(0, 3, (30,)) * 100)


@pytest.mark.parametrize(
    ("kind", "forget", "retain", "target", "message"),
    [
        (Regression, LESS, MORE, Unseen(NEW), "Expected labels that are classes, but got torch.float32"),
        (Regression, LESS, MORE, SecondChoice(), "give the loss where the forget set should end, or Holdout"),
        (Base, OUTSIDE, RETAIN, Unseen(HELD_OUT), "Expected labels in 0 .. 2"),
        (Base, SAMPLES, DataLoader(Stream(), batch_size=8), Unseen(HELD_OUT), "Say it: Unseen\\(counts="),
        (Base, SAMPLES, RETAIN, Unseen(HELD_OUT, counts={7: 1}), "Expected `class` to be .* but got 7"),
        (Base, SAMPLES, RETAIN, Unseen(HELD_OUT, counts={0: 0, 1: 0, 2: 0}), "Expected a class that is kept"),
    ],
)
def test_what_has_no_answer_is_refused_before_the_first_step(
    kind: type[Base], forget: Any, retain: Any, target: Any, message: str
) -> None:
    module = build(kind)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(HAMUError, match=message):
        unlearn(module, forget, target, retain)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_what_makes_no_sense_is_refused_at_once() -> None:
    with pytest.raises(HAMUValueError, match="Expected Unseen\\(counts=None\\) without `objective`, but got NPO"):
        HAMUCallback(SAMPLES, target=Unseen(HELD_OUT), objective=NPO())
    with pytest.raises(HAMUValueError, match="Expected `teacher` to be a model that never saw"):
        Unseen(teacher=3)
    with pytest.raises(HAMUValueError, match="Expected `counts` to be"):
        Unseen(counts=[3])  # type: ignore[arg-type]
    with pytest.raises(HAMUValueError, match="Expected held-out data"):
        Unseen([])
    assert Holdout(HELD_OUT).objective is None
