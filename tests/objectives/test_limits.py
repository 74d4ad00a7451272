"""Objectives at their limits, and settings that they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives import (
    DELETE,
    DPO,
    NPO,
    RMU,
    UNDIAL,
    BadTeacher,
    BatchPass,
    CrossEntropy,
    FrozenCopy,
    IdkDPO,
    LossCap,
    Objective,
    ReferenceKL,
    SimNPO,
    UniformLabels,
    WeightedSum,
)
from tests.objectives.models import CLASSES, VOCABULARY, grads, make_batch, make_model, perturbed
from tests.objectives.test_formulas import CASES, TOLERANCE, log_p, places_of


def test_npo_tends_to_gradient_ascent() -> None:
    """For beta -> 0 the gradient is that of the summed cross-entropy."""
    model, batch = make_model("tokens"), make_batch("tokens")
    other = perturbed(model)
    samples = [sum(-log_p(z, label) for z, _, label in s) for s in places_of("tokens", model, other, batch) if s]
    ascent = grads(sum(samples) / 4, model)  # type: ignore[arg-type]
    for beta in (1e-2, 1e-4):
        found = grads(NPO(beta, reference=FrozenCopy(other))(BatchPass(model, batch)), model)
        for one, limit in zip(found, ascent, strict=True):
            # The weight of a sample is 2 sigmoid(beta ratio) = 1 + beta ratio / 2; ratios are below 20 here.
            torch.testing.assert_close(one, limit, atol=0, rtol=10 * beta * 4)


@pytest.mark.parametrize("beta", [0.01, 1.0, 50.0])
def test_npo_at_the_reference_is_gradient_ascent_for_every_beta(beta: float) -> None:
    model, batch = make_model("classes"), make_batch("classes")
    for one, other in zip(
        grads(NPO(beta)(BatchPass(model, batch)), model),
        grads(CrossEntropy()(BatchPass(model, batch)), model),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


def test_delete_ends_at_the_second_choice_however_sure_the_reference_was() -> None:
    """There it has no gradient, as nothing is left to forget."""
    labels = torch.tensor([0, 2])
    second = torch.tensor([[-60.0, 1.0, 3.0], [0.5, -0.5, -60.0]], dtype=torch.float64)
    sure = second.scatter(1, labels[:, None], 500.0)
    logits = second.clone().requires_grad_()
    batch = BatchPass(nn.Identity(), (logits, sure))

    def outputs(module: nn.Module, pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return pair[int(isinstance(module, nn.Flatten))], labels

    value = DELETE(reference=FrozenCopy(nn.Flatten()), outputs=outputs)(batch)
    (grad,) = torch.autograd.grad(value, logits)
    # The label has e^-60 of the probability left.
    assert value.item() == pytest.approx(0, abs=TOLERANCE) and grad.abs().max() < TOLERANCE


def test_a_cap_stops_the_samples_above_it() -> None:
    model, batch = make_model("classes"), make_batch("classes")
    losses = CrossEntropy().samples(BatchPass(model, batch))
    level = losses.sort().values[1:3].mean().item()
    keeps = losses < level
    (expected,) = torch.autograd.grad((losses * keeps).sum() / 4, [model.head.weight], retain_graph=True)
    (found,) = torch.autograd.grad(LossCap(CrossEntropy(), level)(BatchPass(model, batch)), [model.head.weight])
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    (none,) = torch.autograd.grad(LossCap(CrossEntropy(), -1.0)(BatchPass(model, batch)), [model.head.weight])
    assert not none.any()


def test_what_stands_on_masked_places_does_no_harm() -> None:
    """Padding may hold NaN and infinity: no value and no gradient may see it."""
    labels = torch.tensor([[1, -100], [-100, -100]])
    clean = torch.randn(2, 2, VOCABULARY, dtype=torch.float64)
    poisoned = torch.where((labels == -100).unsqueeze(-1), torch.nan, clean)
    for name, (make, _) in CASES.items():
        if name == "bad teacher":
            continue
        values = []
        for logits in (clean.clone().requires_grad_(), poisoned.clone().requires_grad_()):
            objective = make(FrozenCopy(nn.Flatten(0, 0)))
            objective.__dict__["outputs"] = lambda module, batch, logits=logits: (logits, labels)
            for part in getattr(objective, "objectives", [getattr(objective, "objective", objective)]):
                part.outputs = objective.outputs  # type: ignore[attr-defined]
            value = objective(BatchPass(nn.Identity(), None))
            values.append((value, torch.autograd.grad(value, logits)[0]))
        (value, grad), (other, other_grad) = values
        assert torch.equal(value, other), name
        assert torch.equal(grad, other_grad), name


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_large_logits_and_sixteen_bits_stay_finite(scale: float) -> None:
    model = nn.Linear(4, CLASSES).to(torch.bfloat16)
    batch = (scale * torch.randn(3, 4).to(torch.bfloat16), torch.tensor([0, 1, 2]))
    other = perturbed(model)
    for name, (make, _) in CASES.items():
        value = make(FrozenCopy(other))(BatchPass(model, batch))
        assert value.dtype == torch.float32, name
        assert value.isfinite(), name
        assert all(bool(grad.isfinite().all()) for grad in grads(value, model)), name


def test_log_classes_is_the_value_of_a_guess() -> None:
    model = nn.Linear(4, CLASSES).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    batch = BatchPass(model, make_batch("classes"))
    assert CrossEntropy()(batch).item() == pytest.approx(math.log(CLASSES), abs=1e-12)  # rounding of one logarithm
    assert UniformLabels()(batch).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NPO(0.0), "Expected `beta` to be positive, but got 0.0"),
        (lambda: SimNPO(-1.0), "Expected `beta` to be positive"),
        (lambda: DPO(beta=float("nan")), "Expected `beta` to be positive, but got nan"),
        (lambda: UNDIAL(0.0), "Expected `strength` to be positive"),
        (lambda: ReferenceKL(temperature=0.0), "Expected `temperature` to be positive"),
        (lambda: ReferenceKL(direction="backward"), "Expected `direction` to be one of 'forward', 'reverse'"),  # type: ignore[arg-type]
        (lambda: BadTeacher(temperature=-1.0), "Expected `temperature` to be positive"),
        (lambda: RMU("body", 0.0), "Expected `coefficient` to be positive"),
        (lambda: IdkDPO([[]]), "Expected `answers` to be lists of token ids"),
        (lambda: WeightedSum(), "Expected pairs of a positive weight and an objective"),
        (lambda: WeightedSum((-1.0, CrossEntropy())), "Expected `weight` to be positive, but got -1.0. Give what"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Objective], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        make()


def test_layers_that_cannot_be_steered_are_refused() -> None:
    model, batch = make_model("classes"), make_batch("classes")
    with pytest.raises(
        HAMUValueError, match="Expected `layer` to be the name of a layer, but Classifier has no 'tail'"
    ):
        RMU("tail", 1.0)(BatchPass(model, batch))
    model.unused = nn.Linear(2, 2)
    with pytest.raises(HAMUValueError, match="to run and to return activations .*, but got no call"):
        RMU("unused", 1.0)(BatchPass(model, batch))


def test_idk_answers_need_tokens() -> None:
    with pytest.raises(HAMUValueError, match="Expected a mapping with 'input_ids', 'attention_mask' and 'labels'"):
        IdkDPO([[1]])(BatchPass(make_model("classes"), make_batch("classes")))
