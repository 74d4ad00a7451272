"""References that share the trained module's weights, and references that are another model than they should be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.objectives import (
    DPO,
    NPO,
    AdaptersDisabled,
    BatchPass,
    CachedLogits,
    CrossEntropy,
    FrozenCopy,
    Objective,
    ReferenceKL,
    SecondAdapter,
    UnseenAnswer,
    WeightedSum,
)
from tests.objectives.models import Adapted, make_batch, make_model, perturbed


class TwoAdapters(nn.Module):
    """A base and two biases by name, one of which is on and trained: the interface of PEFT's models."""

    def __init__(self) -> None:
        super().__init__()
        self.base = make_model("classes")
        self.biases = nn.ParameterDict({name: torch.zeros(5).double() for name in ("trained", "original")})
        self.dropout = nn.Dropout(0.5)
        self.peft_config = dict.fromkeys(self.biases)
        self.set_adapter("trained")

    @property
    def active_adapter(self) -> str:
        return self._active

    def set_adapter(self, name: str) -> None:
        self._active = name
        for known, bias in self.biases.items():
            bias.requires_grad_(known == name)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(self.dropout(x)) + self.biases[self._active]


def begun(objective: Objective) -> Objective:
    objective.expect_start()
    return objective


def adapted(adapter: float) -> tuple[Adapted, Any]:
    model = Adapted(make_model("classes")).double()
    model.adapter.data += adapter * torch.arange(5.0)
    return model, make_batch("classes")


def summed(reference: AdaptersDisabled) -> Objective:
    return WeightedSum((1.0, ReferenceKL(reference)), (0.5, CrossEntropy()))


@pytest.mark.parametrize("make", [NPO, ReferenceKL, summed])
def test_adapters_that_hold_the_knowledge_are_noticed(make: Callable[..., Objective]) -> None:
    """Also beside dropout, which the comparison does not see."""
    model, batch = adapted(3.0)
    objective = begun(make(reference=AdaptersDisabled()))
    with pytest.raises(HAMUStateError, match=r"AdaptersDisabled to be the module before unlearning.* differ by \d"):
        objective(BatchPass(model, batch))
    model, batch = adapted(0.0)
    objective = begun(make(reference=AdaptersDisabled()))
    objective(BatchPass(model, batch))
    model.adapter.data += 3.0 * torch.arange(5.0)
    objective(BatchPass(model, batch))  # once


def test_the_number_is_the_distance_of_log_likelihoods() -> None:
    model, (x, y) = adapted(3.0)
    model.eval()
    with torch.no_grad():
        on, off = model(x).log_softmax(-1), model.base(x).log_softmax(-1)
    apart = sum(abs(float(on[i, y[i]] - off[i, y[i]])) for i in range(len(y))) / len(y)
    with pytest.raises(HAMUStateError, match=f"differ by {apart:.3g} nats"):
        begun(NPO(reference=AdaptersDisabled()))(BatchPass(model, (x, y)))


def test_what_is_not_compared() -> None:
    """Outside of a fit, a run that goes on, another model on purpose, a teacher, and a copy, which is the module."""
    model, batch = adapted(3.0)
    NPO(reference=AdaptersDisabled())(BatchPass(model, batch))
    begun(NPO(reference=AdaptersDisabled(is_start=False)))(BatchPass(model, batch))
    resumed = begun(NPO(reference=AdaptersDisabled()))
    resumed.expect_start(False)
    resumed(BatchPass(model, batch))
    assert not FrozenCopy().is_start
    objective = begun(UnseenAnswer(teacher=AdaptersDisabled()))
    assert not objective.teacher._is_due  # type: ignore[attr-defined]


def test_another_model_that_is_given_is_told(tmp_path: Any) -> None:
    model, batch = make_model("classes"), make_batch("classes")
    begun(NPO(reference=FrozenCopy(copy.deepcopy(model))))(BatchPass(model, batch))
    other = perturbed(model)
    for parameter in other.parameters():
        parameter.data *= 5
    with pytest.warns(UserWarning, match="Expected FrozenCopy to be the module before unlearning"):
        begun(NPO(reference=FrozenCopy(other)))(BatchPass(model, batch))
    cache = CachedLogits(tmp_path / "logits").fill(other, [batch])
    with pytest.warns(UserWarning, match="Expected CachedLogits to be the module before unlearning"):
        begun(NPO(reference=cache))(BatchPass(model, batch))


def test_a_second_adapter_is_the_reference() -> None:
    model, (x, y) = TwoAdapters(), make_batch("classes")
    model.biases["original"].data += torch.arange(5.0)
    reference = SecondAdapter("original")
    expected = model.base(x) + torch.arange(5.0)
    with reference.using(model) as other:
        assert torch.equal(other(x), expected)
    assert (model.active_adapter, model.training) == ("trained", True)
    assert {name: p.requires_grad for name, p in model.biases.items()} == {"trained": True, "original": False}
    with pytest.raises(HAMUStateError, match=r"(?s)SecondAdapter to be the module before.*model\.load_adapter"):
        begun(DPO(lambda batch: batch, reference=reference))(BatchPass(model, (x, y)))


def test_the_gradient_goes_to_the_trained_adapter() -> None:
    model, batch = TwoAdapters().eval(), make_batch("classes")
    model.biases["original"].data += 0.01 * torch.arange(5.0)
    fixed = copy.deepcopy(model)
    fixed.set_adapter("original")
    found, expected = (
        torch.autograd.grad(NPO(reference=r)(BatchPass(model, batch)), model.biases["trained"])[0]
        for r in (SecondAdapter("original"), FrozenCopy(fixed))
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    NPO(reference=SecondAdapter("original"))(BatchPass(model, batch)).backward()
    torch.testing.assert_close(model.biases["trained"].grad, expected, rtol=1e-12, atol=0)
    assert model.biases["original"].grad is None


@pytest.mark.parametrize(
    ("name", "match"), [("other", "but got 'other'"), ("trained", "another adapter than the active")]
)
def test_adapters_that_cannot_be_the_reference(name: str, match: str) -> None:
    with pytest.raises(HAMUValueError, match=match), SecondAdapter(name).using(TwoAdapters()):
        pass
    with (
        pytest.raises(HAMUValueError, match="Expected a module with `set_adapter`"),
        SecondAdapter(name).using(nn.Linear(1, 1)),
    ):
        pass
