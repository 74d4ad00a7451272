"""Squared gradients of single samples, against a loop over the samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.methods import _fisher, empirical_fisher, expected_fisher
from tests.methods.setups import Classifier, build, make_samples, untouched

# float64 sums of some dozens of terms in another order.
TOLERANCE: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-14}


def squares_of(module: Classifier, loss: Tensor) -> dict[str, Tensor]:
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return {n: g**2 for n, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)}


def slow_fisher(module: Classifier, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    module.eval()
    terms = [squares_of(module, cross_entropy(module(x[i : i + 1]), y[i : i + 1])) for i in range(len(x))]
    module.train()
    return {name: sum(term[name] for term in terms) / len(x) for name in terms[0]}  # type: ignore[misc]


@pytest.mark.parametrize("batchnorm", [False, True])
def test_it_is_the_mean_of_a_loop_over_samples(batchnorm: bool) -> None:
    module, samples = build(batchnorm, torch.float64), make_samples(23, dtype=torch.float64)
    with untouched(module):
        found, count = empirical_fisher(module, DataLoader(samples, batch_size=10))
    assert count == 23
    torch.testing.assert_close(found, slow_fisher(module, *samples.tensors), **TOLERANCE)


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    module, samples = build(dtype=torch.float64), make_samples(23, dtype=torch.float64)
    monkeypatch.setattr(_fisher, "_NUMBERS", 7 * sum(p.numel() for p in module.parameters()))
    found, count = empirical_fisher(module, DataLoader(samples, batch_size=23))
    assert count == 23
    torch.testing.assert_close(found, slow_fisher(module, *samples.tensors), **TOLERANCE)


def test_frozen_parameters_are_left_out() -> None:
    module = build()
    module.net[0].requires_grad_(False)
    found, _ = empirical_fisher(module, DataLoader(make_samples(5)))
    assert set(found) == {"net.3.weight", "net.3.bias"}


def test_another_loss() -> None:
    module, samples = build(dtype=torch.float64), make_samples(9, dtype=torch.float64)

    def losses(forward: Any, batch: Any) -> Tensor:
        return forward(batch["input"]).square().sum(dim=1)

    found, _ = empirical_fisher(module, [{"input": samples.tensors[0]}], losses)
    module.eval()
    slow = [squares_of(module, module(x[None]).square().sum()) for x in samples.tensors[0]]
    torch.testing.assert_close(found["net.3.bias"], sum(s["net.3.bias"] for s in slow) / 9, **TOLERANCE)


@pytest.mark.parametrize("batchnorm", [False, True])
def test_expected_labels_are_weighted_by_their_probability(batchnorm: bool) -> None:
    module, samples = build(batchnorm, torch.float64), make_samples(11, dtype=torch.float64)
    with untouched(module):
        found = expected_fisher(module, DataLoader(samples, batch_size=4))
    module.eval()
    slow = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for x in samples.tensors[0]:
        for label, probability in enumerate(module(x[None]).softmax(dim=1)[0].tolist()):
            for name, square in squares_of(module, cross_entropy(module(x[None]), torch.tensor([label]))).items():
                slow[name] += probability * square / 11
    torch.testing.assert_close(found, slow, **TOLERANCE)


def test_batches_that_are_no_pairs() -> None:
    with pytest.raises(
        HAMUValueError, match=r"Expected batches `\(x, y\)` of a classifier, but got dict. Pass `losses`"
    ):
        empirical_fisher(build(), [{"x": torch.zeros(2, 6)}])


def test_no_samples() -> None:
    with pytest.raises(HAMUValueError, match="Expected at least one sample"):
        empirical_fisher(build(), [])
