"""How modules are asked for logits and labels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives import (
    DELETE,
    NPO,
    RMU,
    UNDIAL,
    BatchPass,
    CrossEntropy,
    FrozenCopy,
    IdkDPO,
    LossCap,
    ModuleOutputs,
    RandomLabels,
    ReferenceKL,
    RMURetain,
    SimNPO,
    UniformLabels,
    WeightedSum,
)
from tests.objectives.models import CLASSES, LanguageModel, make_batch, make_model


class TakesAll(nn.Module):
    """A LightningModule's `forward(**inputs)` around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)


class Demands(LanguageModel):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        return super().forward(input_ids, None, labels)


class Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


def test_pairs_go_in_as_they_are() -> None:
    model, (x, y) = make_model("classes"), make_batch("classes")
    for batch in ((x, y), [x, y]):
        logits, labels = ModuleOutputs()(model, batch)
        assert torch.equal(logits, model(x))
        assert labels is y


@pytest.mark.parametrize("wrap", [lambda model: model, TakesAll])
def test_mappings_go_in_by_name_without_labels(wrap: Any) -> None:
    model, batch = make_model("tokens"), make_batch("tokens")
    logits, labels = ModuleOutputs()(wrap(model), batch)
    assert torch.equal(logits, model(batch["input_ids"], batch["attention_mask"]).logits)
    assert torch.equal(labels[:, :-1], batch["labels"][:, 1:])
    assert (labels[:, -1] == -100).all()
    assert "labels" in batch


def test_labels_go_in_where_they_are_demanded() -> None:
    batch = make_batch("tokens")
    del batch["attention_mask"]
    seen = []
    model = Demands().double()
    model.register_forward_hook(lambda module, args, output: seen.append(output.saw_labels))
    ModuleOutputs()(model, batch)
    assert seen == [True]


def test_encoder_and_decoder_get_labels_that_are_not_moved() -> None:
    """Even where they are a copy of the inputs."""
    model, batch = make_model("tokens"), make_batch("tokens")
    model.config = SimpleNamespace(is_encoder_decoder=True)
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.saw_labels))
    assert torch.equal(ModuleOutputs()(model, batch)[1], batch["labels"])
    assert seen == [True]


@pytest.mark.parametrize("change", ["moved before", "classes", "masked tokens"])
def test_labels_that_are_no_copy_are_not_moved(change: str) -> None:
    model, batch = make_model("tokens"), make_batch("tokens")
    if change == "moved before":
        batch["labels"] = torch.cat([batch["labels"][:, 1:], torch.full((4, 1), -100)], dim=1)
    elif change == "classes":
        batch["labels"] = batch["labels"].clamp(max=1)
    else:
        batch["labels"] = torch.where(torch.arange(6) == 3, batch["input_ids"], -100)
        batch["input_ids"] = torch.where(torch.arange(6) == 3, 0, batch["input_ids"])
    assert torch.equal(ModuleOutputs()(model, batch)[1], batch["labels"])
    moved = torch.cat([batch["labels"][:, 1:], torch.full((4, 1), -100)], dim=1)
    assert torch.equal(ModuleOutputs(shift=True)(model, batch)[1], moved)


def test_a_copy_is_moved_in_a_pair_too_unless_told_otherwise() -> None:
    model, ids = make_model("tokens"), make_batch("tokens")["input_ids"]
    assert torch.equal(ModuleOutputs()(model, (ids, ids.clone()))[1][:, :-1], ids[:, 1:])
    assert torch.equal(ModuleOutputs(shift=False)(model, (ids, ids.clone()))[1], ids)


@pytest.mark.parametrize(
    "make",
    [
        lambda r: WeightedSum((1.0, CrossEntropy()), (1.0, LossCap(ReferenceKL(r), 1.0))),
        lambda r: NPO(reference=r),
        lambda r: SimNPO(),
        lambda r: IdkDPO([[1, 2], [3]], reference=r),
        lambda r: UNDIAL(reference=r),
        lambda r: DELETE(reference=r),
        lambda r: RandomLabels(),
        lambda r: UniformLabels(),
        lambda r: RMU("body", 1.0),
        lambda r: RMURetain("body", reference=r),
    ],
)
def test_nothing_is_read_on_the_host(make: Any) -> None:
    """Fake tensors have no values, and raise where somebody wants one."""
    with FakeTensorMode():
        model = LanguageModel()
        ids = torch.ones(2, 5, dtype=torch.int64)
        batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
        assert make(FrozenCopy(LanguageModel()))(BatchPass(model, batch)).shape == ()


@pytest.mark.parametrize("wrap", [lambda z: z, lambda z: SimpleNamespace(logits=z), lambda z: {"logits": z, "loss": 0}])
def test_logits_are_found_in_what_the_module_returns(wrap: Any) -> None:
    logits = torch.randn(2, 3)
    found, _ = ModuleOutputs()(Returns(wrap(logits)), (torch.ones(2), torch.tensor([0, 1])))
    assert found is logits


def test_own_outputs_take_any_batch() -> None:
    model, (x, y) = make_model("classes"), make_batch("classes")
    objective = CrossEntropy(outputs=lambda module, batch: (module(batch.x), batch.y))
    batch = SimpleNamespace(x=x, y=y)
    assert torch.equal(objective(BatchPass(model, batch)), CrossEntropy()(BatchPass(model, (x, y))))


Y = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (nn.Identity(), torch.ones(3), "Expected a batch \\(x, y\\) or a mapping with 'labels', but got a Tensor"),
        (nn.Identity(), {"x": 1, "y": 2}, "but got keys \\['x', 'y'\\]. Pass `outputs=`"),
        (nn.Identity(), (torch.ones(2, 3), 1), "Expected the labels to be a tensor, but got int"),
        (nn.Identity(), {"input": torch.ones(2, 3), "index": Y, "labels": Y}, "Expected `forward` of Identity to take"),
        (nn.Module(), (torch.ones(2, 3), Y), "Expected Module to have a `forward` that works"),
        (Returns((Y, Y)), (torch.ones(2, 3), Y), "Expected Returns to return logits, .* but got tuple"),
        (nn.Identity(), (torch.ones(2, 3), torch.ones(2, 3)), "Expected logits \\[N, C\\] with labels \\[N\\]"),
        (nn.Identity(), (torch.ones(2, 3, 4, 4), Y), "got shapes \\[2, 3, 4, 4\\] and \\[2\\]"),
        (nn.Identity(), (torch.ones(2, 3), torch.ones(2)), "Expected the labels to be classes, integers, but got"),
    ],
)
def test_what_cannot_be_known_is_refused(model: nn.Module, batch: Any, message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        CrossEntropy()(BatchPass(model, batch))


def test_terms_share_one_forward_pass() -> None:
    model, batch = make_model("classes"), make_batch("classes")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    WeightedSum((1.0, CrossEntropy()), (1.0, UniformLabels()))(BatchPass(model, batch))
    assert len(calls) == 1
    assert CLASSES == model(batch[0]).shape[1]
