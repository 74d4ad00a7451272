"""Relearning: the same as a plain loop, leaves everything alone, and tells forgotten from never known."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.methods import Relearning, relearn
from hamu_lightning.metrics.functional import Estimate, anamnesis_index
from tests.methods.setups import build, make_samples, untouched


def tensors_of(samples: TensorDataset) -> tuple[Tensor, Tensor]:
    x, y = samples.tensors
    return x, y


def measure(module: LightningModule, samples: TensorDataset) -> tuple[float, float]:
    x, y = tensors_of(samples)
    with torch.no_grad():
        logits = copy.deepcopy(module).eval()(x).double()
    return float((logits.argmax(1) == y).double().mean()), float(cross_entropy(logits, y))


def test_it_is_a_plain_loop() -> None:
    """All samples in each batch, and no dropout: their order matters only by rounding."""
    module, samples = build(batchnorm=True), make_samples(20)
    module.net[3].p = 0.0  # type: ignore[union-attr]
    result = relearn(module, samples, steps=5, lr=0.1)
    student = copy.deepcopy(module).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    expected = [measure(student, samples)]
    for _ in range(5):
        x, y = tensors_of(samples)
        optimizer.zero_grad()
        cross_entropy(student(x), y).backward()
        optimizer.step()
        expected.append(measure(student, samples))
    assert len(result.accuracies) == len(result.losses) == 6
    assert result.accuracies == pytest.approx([accuracy for accuracy, _ in expected], abs=1e-12)
    # Five steps in float32, whose sums over 20 samples have another order.
    assert result.losses == pytest.approx([loss for _, loss in expected], abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_that_is_given_changes(training: bool) -> None:
    module = build(batchnorm=True).train(training)
    with untouched(module), torch.no_grad():
        relearn(module, make_samples(20), steps=3)


def test_the_seed_decides() -> None:
    module, samples = build(), make_samples(40)
    curves = [relearn(module, samples, steps=4, batch_size=8, seed=seed).losses for seed in (1, 1, 2)]
    assert curves[0] == curves[1] != curves[2]


def test_a_part_is_taught_and_all_is_watched() -> None:
    module, samples = build(), make_samples(40)
    seen: list[int] = []

    class Watching(type(module)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            if self.training:
                seen.extend(tuple(row.tolist()) for row in x)  # type: ignore[arg-type]
            return super().forward(x)

    module.__class__ = Watching
    result = relearn(module, samples, steps=12, batch_size=4, share=0.2)
    assert len(seen) == 12 * 4 and len(set(seen)) == 8
    assert result.losses[0] == pytest.approx(measure(module, samples)[1], abs=1e-6)
    assert relearn(module, samples, steps=1, share=1e-9).losses[1] != result.losses[1]
    rest = Subset(samples, range(30, 40))
    watched = relearn(module, DataLoader(samples, batch_size=7), steps=1, watch=rest)
    x, y = tensors_of(samples)
    assert watched.losses[0] == pytest.approx(measure(module, TensorDataset(x[30:], y[30:]))[1], abs=1e-6)


def test_it_ends_where_it_is_told() -> None:
    module, samples = build(), make_samples(40)
    whole = relearn(module, samples, steps=60, lr=0.2)
    aim = max(whole.accuracies)
    short = relearn(module, samples, steps=60, lr=0.2, until=aim)
    count = whole.accuracies.index(aim) + 1
    assert 1 < count < 61 and short == Relearning(whole.accuracies[:count], whole.losses[:count])


def test_what_was_known_comes_back_sooner() -> None:
    """Only the last layer's bias was changed: all that was learned is still there."""
    samples, taught = make_samples(60), build()
    optimizer = torch.optim.SGD(taught.parameters(), lr=0.2)
    for _ in range(300):
        x, y = tensors_of(samples)
        optimizer.zero_grad()
        cross_entropy(taught(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    original, _ = measure(taught, samples)
    hidden = copy.deepcopy(taught)
    with torch.no_grad():
        hidden.net[-1].bias[1] -= 2.0  # type: ignore[index, union-attr]
    assert measure(hidden, samples)[0] < 0.95 * original
    steps, retrained = (relearn(m, samples, steps=80, lr=0.05).steps(original) for m in (hidden, build()))
    assert 0 < steps.value < retrained.value
    assert anamnesis_index(steps, retrained).value < 0.6


def test_a_cap_is_a_lower_bound() -> None:
    result = relearn(build(), make_samples(20), steps=2, lr=1e-9)
    assert result.steps(original=1.0) == Estimate(2.0, bound="at least")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(make_samples(4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"forget": Stream()}, "Expected `forget` to be a Dataset with samples"),
        ({"forget": Subset(make_samples(4), [])}, "Expected `forget` to be a Dataset with samples"),
        ({"forget": [1, 2]}, "Expected `forget` to be a Dataset with samples"),
        ({"module": torch.nn.Linear(6, 3)}, "Expected `module` to be a LightningModule"),
        ({"steps": 0}, "Expected `steps` to be at least 1"),
        ({"share": 0.0}, "Expected `share` to be above 0 and at most 1"),
        ({"until": 95}, "Expected `until` to be between 0 and 1"),
        ({"lr": math.nan}, "Expected `lr` to be positive"),
    ],
)
def test_other_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(HAMUValueError, match=words):
        relearn(**{"module": build(), "forget": make_samples(4), **arguments})


def test_a_frozen_module_cannot_learn() -> None:
    module = build().requires_grad_(False)
    with pytest.raises(HAMUValueError, match="weights that require a gradient"):
        relearn(module, make_samples(4))
