"""What a target is measured on: all of the forget set, with gradients, on data that are loaded as those of training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUQ, Chance, HAMUCallback, Holdout
from hamu_lightning.callbacks import StopReason
from hamu_lightning.callbacks.goals._pass_mean import PassMean
from hamu_lightning.callbacks.goals._targets import count_classes
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.rules import RelativeRadius, TargetQuota
from tests.callbacks.goals.test_targets import FORGET, HELD_OUT, loss_on, trained
from tests.callbacks.modules import Base, build, fit, make_data


def reach(module: Base, target: Any, forget: Any, radius: float = 0.02, **options: Any) -> HAMUCallback:
    hamu = HAMUCallback(
        forget, HAMUQ(TargetQuota(target), radius=RelativeRadius(radius)), verify=options.pop("verify", False)
    )
    fit(module, hamu, **{"max_epochs": 20, **options})
    return hamu


def sorted_by_loss(module: Base) -> Subset[Any]:
    """Those that are forgotten first at the beginning."""
    x, y = FORGET.tensors
    with torch.no_grad():
        losses = cross_entropy(module(x), y, reduction="none")
    return Subset(FORGET, losses.argsort(descending=True).tolist())


@pytest.mark.parametrize("most", [2, 32])
def test_sorted_data_end_the_fit_where_all_of_them_are_forgotten(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hamu_lightning.callbacks.goals._forget_level._MOST_BATCHES", most)
    module = trained()
    hamu = reach(module, 0.6, DataLoader(sorted_by_loss(module), batch_size=10), radius=0.05, verify=True)
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    assert 0.95 * 0.6 <= loss_on(module, FORGET) < 1.4 * 0.6  # the last step may go too far
    # What is said is what the whole set has at the end.
    assert float(re.findall(r"forget loss ([\d.]+)", hamu.stop_message or "")[0]) == pytest.approx(
        loss_on(module, FORGET), rel=1e-3
    )


def test_a_fit_that_ends_before_says_the_loss_at_its_end() -> None:
    module = trained()
    with pytest.warns(UserWarning, match="ended before the target") as caught:
        reach(module, 50.0, DataLoader(FORGET, batch_size=20, shuffle=True), max_steps=7)
    text = next(str(w.message) for w in caught if "before the target" in str(w.message))
    assert float(re.findall(r"forget loss ([\d.]+)", text)[0]) == pytest.approx(loss_on(module, FORGET), rel=1e-3)


class Once(IterableDataset[Any]):
    """Holds what cannot be copied, so that nobody can read it beside the fit."""

    def __init__(self) -> None:
        self.source = (i for i in range(0))

    def __iter__(self) -> Iterator[Any]:
        x, y = FORGET.tensors
        yield from zip(x, y, strict=True)


def test_a_set_that_cannot_be_read_again_is_judged_by_a_whole_pass() -> None:
    module = trained()
    with pytest.warns(UserWarning, match="judged by the mean loss over a whole pass"):
        hamu = reach(module, 0.45, DataLoader(Once(), batch_size=20), radius=0.05)
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    assert "seen in the last whole pass" in (hamu.stop_message or "")
    assert loss_on(module, FORGET) > 0.75 * 0.45  # batches that have gone by are seen at other weights


def test_the_mean_of_a_pass_is_there_when_it_has_ended() -> None:
    first, second = PassMean(), PassMean()
    for number, loss in ((1, 2.0), (1, 4.0), (2, 9.0)):
        assert first.mean is None
        first.add(torch.tensor(loss), number)
    second.load_state_dict(first.state_dict())
    second.add(torch.tensor(5.0), 3)
    assert (float(first.mean), float(second.mean)) == (3.0, 9.0)  # type: ignore[arg-type]


class Penalized(Base):
    """Takes gradients inside of its step, some of them into `.grad`."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch[0].detach().requires_grad_(), batch[1]
        loss = cross_entropy(self(x), y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + 0.1 * slope.square().sum()


@pytest.mark.parametrize("target", [2.0, Holdout(HELD_OUT)])
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.filterwarnings("ignore:The fit has ended before the target")
def test_modules_that_take_gradients_are_measured(target: Any, verify: bool) -> None:
    ends = []
    for kind in (Penalized, Base):
        module = trained(kind)
        hamu = reach(module, target, DataLoader(FORGET, batch_size=20), verify=verify, max_epochs=1)
        ends.append((hamu.combined_steps, float(hamu.state_dict()["optimizer"]["aims"]["forget"]["level"])))
    (steps, level), (_, without) = ends
    assert steps > 0 and level > without  # the penalty is in what is measured


def test_gradients_of_a_measurement_go_nowhere() -> None:
    """A backward pass inside of the step leaves `.grad` as it was; runs with and without measuring are the same."""

    class Leaves(Base):
        @override
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            cross_entropy(self(batch[0]), batch[1]).backward()
            for parameter in self.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad * 0
            return super().training_step(batch, batch_idx)

    ends = []
    for target in (50.0, Holdout(HELD_OUT, every=1)):
        module = build(Leaves)

        class Constant(Holdout):
            @override
            def measure(self, module: Any, mean_loss: Any, batch: Any) -> Any:
                super().measure(module, mean_loss, batch)
                return 50.0

        goal = target if isinstance(target, float) else Constant(HELD_OUT, every=1)
        with pytest.warns(UserWarning, match="before the target"):
            reach(module, goal, DataLoader(FORGET, batch_size=20), max_steps=4)
        ends.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class Summed(Base):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return cross_entropy(self(x), y, reduction="sum")


@pytest.mark.filterwarnings("ignore:The fit has ended before the target")
def test_held_out_samples_come_in_the_batches_of_training() -> None:
    """A sum over a batch depends on its size; and what collates the training data collates these."""
    sizes = []

    def collate(samples: Any) -> Any:
        sizes.append(len(samples))
        return torch.utils.data.default_collate(samples)

    module, targets = build(Summed), []
    loader = DataLoader(make_data(32), batch_size=8, collate_fn=collate)

    class Spy(Holdout):
        @override
        def measure(self, module: Any, mean_loss: Any, batch: Any) -> Any:
            sizes.clear()
            targets.append(float(super().measure(module, mean_loss, batch)))
            assert sizes == [8, 8, 8]
            return 500.0

    expected = loss_on(module, make_data(24, seed=4)) * 8
    reach(module, Spy(make_data(24, seed=4)), DataLoader(FORGET, batch_size=8), loader=loader, max_steps=2)
    assert targets == [pytest.approx(expected, rel=1e-5)]  # float32


@pytest.mark.parametrize("has_validation", [True, False])
def test_without_data_the_validation_loader_is_held_out(has_validation: bool) -> None:
    class Validated(Base):
        @override
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def val_dataloader(self) -> Any:
            return DataLoader(HELD_OUT, batch_size=10) if has_validation else []

    module = trained(Validated if has_validation else Base)
    if has_validation:
        hamu = reach(module, Holdout(), DataLoader(FORGET, batch_size=20, shuffle=True))
        assert hamu.stop_reason is StopReason.TARGET_REACHED
        assert loss_on(module, FORGET) == pytest.approx(loss_on(module, HELD_OUT), rel=0.25)
    else:
        with pytest.raises(Exception, match="Expected one validation loader for Holdout\\(\\) without data"):
            reach(module, Holdout(), DataLoader(FORGET, batch_size=20))


ANSWERS = torch.tensor([[0.0, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    ("labels", "logits", "classes"),
    [
        (ANSWERS, torch.zeros(2, 3), 2),
        (ANSWERS.long(), torch.zeros(2, 3), 2),
        (torch.tensor([1.0, 0.0]), torch.zeros(2), 2),
        (torch.tensor([1, 0]), torch.zeros(2, 1), 2),
        (torch.tensor([2, 0]), torch.zeros(2, 3), 3),
        (torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 5, 4), 5),
        (torch.tensor([[0.1, 0.9, 0], [0.5, 0, 0.5]]), torch.zeros(2, 3), 3),
    ],
)
def test_a_guess_is_one_among_what_the_labels_say(labels: Tensor, logits: Tensor, classes: int) -> None:
    module = nn.Module()
    module.forward = lambda *_, **__: logits
    for batch in ((torch.zeros(2), labels), {"x": torch.zeros(2), "labels": labels}):
        assert count_classes(module, batch) == classes


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[0.3], [7.1]]), "they are numbers, as in a regression"),
        (torch.tensor([[0.3], [0.1]]), "Say it: Chance\\(num_classes=2\\)"),
        (torch.eye(2), "Say it: Chance\\(num_classes=2\\)"),
    ],
)
def test_a_regression_has_no_guess(labels: Tensor, message: str) -> None:
    module = nn.Module()
    module.forward = lambda *_: torch.zeros(labels.shape)
    with pytest.raises(HAMUStateError, match=message):
        Chance().measure(module, lambda _: torch.zeros(()), (torch.zeros(2), labels))
    assert Chance(2).measure(module, lambda _: torch.zeros(()), (torch.zeros(2), labels)) == math.log(2)


def test_samples_without_a_finite_loss_are_named() -> None:
    x, y = FORGET.tensors[0].clone(), FORGET.tensors[1]
    x[[3, 27]] = math.nan
    data = TensorDataset(x, y)
    batches = [*DataLoader(data, batch_size=8)]
    for forget, words in (
        (DataLoader(data, batch_size=8, shuffle=True), "in the samples at 3, 27 of the Dataset"),
        (batches, "in the batches at 0, 3"),
    ):
        with pytest.raises(HAMUStateError, match="Expected the forget loss to be a finite number") as caught:
            reach(trained(), 0.8, forget)
        assert words in str(caught.value)
