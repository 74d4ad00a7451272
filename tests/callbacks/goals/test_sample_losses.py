"""The loss of each sample: found in the module's output, checked against its own loss, or not told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamu_lightning.callbacks.goals._sample_losses import _Asking
from hamu_lightning.objectives import BatchPass, CrossEntropy, LossCap

X = torch.linspace(-2, 2, 24).reshape(6, 4)
# A fixed one: of some random networks label smoothing leaves the mean loss where it is.
NET = nn.Linear(4, 3)
nn.init.orthogonal_(NET.weight, gain=2.0, generator=torch.Generator().manual_seed(0))
nn.init.zeros_(NET.bias)


def ask(
    output: Any, labels: Tensor, loss: Any, objective: Any = None, form: str | None = None
) -> tuple[Any, str | None]:
    module = nn.Module()
    module.forward = lambda x: output  # type: ignore[method-assign]
    asking = _Asking(objective, form)
    asking(BatchPass(module, (X, labels), lambda: loss(output, labels)))
    return asking.read, asking.form


@pytest.mark.parametrize(
    ("shape", "labels", "loss", "form"),
    [
        ((6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), F.cross_entropy, "cross-entropy"),
        ((6, 3, 5), torch.arange(30).reshape(6, 5) % 3, F.cross_entropy, "cross-entropy"),
        ((6, 3), torch.eye(3)[[0, 1, 2, 0, 1, 2]], F.cross_entropy, "cross-entropy of shares"),
        ((6, 1), torch.tensor([0.0, 1, 1, 0, 1, 0]), None, "cross-entropy of answers"),
        ((6, 3), torch.eye(3).repeat(2, 1), F.binary_cross_entropy_with_logits, "cross-entropy of answers"),
        ((6, 1), torch.linspace(0, 4, 6).unsqueeze(1), F.mse_loss, "squared error"),
        ((6,), torch.linspace(0, 4, 6), F.mse_loss, "squared error"),
    ],
)
def test_each_sample_has_the_loss_that_it_has_alone(shape: Any, labels: Tensor, loss: Any, form: str) -> None:
    output = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    loss = loss or (lambda o, y: F.binary_cross_entropy_with_logits(o.squeeze(1), y))
    read, found = ask(output, labels, loss)
    assert found == form
    alone = [float(loss(output[i : i + 1], labels[i : i + 1])) for i in range(6)]
    assert read.losses.tolist() == pytest.approx(alone, rel=1e-5)  # float32


def test_tokens_are_averaged_over_the_places_that_count() -> None:
    output = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[1, 2, -100, -100], [3, 4, 5, 6]])
    read, form = ask(output, labels, lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()))
    assert form == "cross-entropy of tokens"
    assert float(read.losses[0]) == pytest.approx(float(F.cross_entropy(output[0, :2], labels[0, :2])), rel=1e-5)
    right = (output.argmax(-1) == labels).float()
    assert read.recognised.tolist() == pytest.approx([float(right[0, :2].mean()), float(right[1].mean())])


def test_a_loss_of_another_kind_is_not_guessed() -> None:
    """Label smoothing: the samples' cross-entropies are not what the module trains on."""
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    read, form = ask(NET(X), labels, lambda o, y: F.cross_entropy(o, y, label_smoothing=0.2))
    assert read is None and form is None


def test_the_values_of_an_objective_stand_in() -> None:
    labels, objective = torch.tensor([0, 1, 2, 0, 1, 2]), LossCap(CrossEntropy(), 0.7)
    output = NET(X)
    read, form = ask(output, labels, lambda o, y: F.cross_entropy(o, y, label_smoothing=0.2), objective)
    assert form == "objective"
    assert read.losses.tolist() == pytest.approx(
        F.cross_entropy(output, labels, reduction="none").clamp(max=0.7).tolist()
    )


def test_the_module_s_own_loss_comes_before_that_of_an_objective() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    _, form = ask(NET(X), labels, F.cross_entropy, LossCap(CrossEntropy(), 0.7))
    assert form == "cross-entropy"
