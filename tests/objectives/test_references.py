"""The models that objectives compare with: what they are, cost, and survive."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.objectives import (
    DELETE,
    DPO,
    NPO,
    UNDIAL,
    AdaptersDisabled,
    BadTeacher,
    BatchPass,
    CrossEntropy,
    FrozenCopy,
    LossCap,
    ModuleOutputs,
    Objective,
    RandomLabels,
    ReferenceKL,
    RMURetain,
    WeightedSum,
)
from hamu_lightning.objectives._divergence import RandomTeacher
from tests.objectives.models import Adapted, Classifier, grads, make_batch, make_model, perturbed

OUTPUTS = ModuleOutputs()


def logits_of(reference: Any, model: nn.Module, batch: Any) -> Tensor:
    return reference.logits(BatchPass(model, batch), OUTPUTS)


def move(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.data += 0.1


def test_the_copy_is_of_the_first_use() -> None:
    model, batch = make_model("classes"), make_batch("classes")
    before = model(batch[0]).detach()
    reference = FrozenCopy()
    assert torch.equal(logits_of(reference, model, batch), before)
    move(model)
    found = logits_of(reference, model, batch)
    assert torch.equal(found, before)
    assert not found.requires_grad
    assert len(list(model.modules())) == 5  # nothing was hung on the module
    assert model.training


def test_a_given_model_is_used_as_it_is() -> None:
    model, batch = make_model("classes"), make_batch("classes")
    other = perturbed(model)
    reference = FrozenCopy(other)
    assert torch.equal(logits_of(reference, model, batch), other(batch[0]))
    assert other.training
    assert other.head.weight.requires_grad
    assert reference.state_dict() == {}
    with pytest.raises(HAMUValueError, match="to be another model, but it is the one that is trained"):
        logits_of(FrozenCopy(model), model, batch)


def test_the_copy_draws_nothing_and_learns_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).double()
    reference, batch = FrozenCopy(), make_batch("classes")
    state, buffers = torch.get_rng_state(), copy.deepcopy(dict(model.named_buffers()))
    first = logits_of(reference, model, batch)
    assert torch.equal(first, logits_of(reference, model, batch))
    assert torch.equal(state, torch.get_rng_state())
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name])


def clone_by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def clone_by_checkpoint(fresh: Callable[[], Any], value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value.state_dict(), file)
    file.seek(0)
    clone = fresh()
    clone.load_state_dict(torch.load(file, weights_only=True))
    return clone


@pytest.mark.parametrize("clone", [copy.deepcopy, clone_by_pickle, partial(clone_by_checkpoint, FrozenCopy)])
def test_the_copy_survives(clone: Callable[[Any], Any]) -> None:
    model, batch = make_model("classes"), make_batch("classes")
    reference = FrozenCopy()
    before = logits_of(reference, model, batch)
    other = clone(reference)
    move(model)
    again = clone(other)  # before its first use
    assert torch.equal(logits_of(other, model, batch), before)
    assert torch.equal(logits_of(again, model, batch), before)
    other.load_state_dict({})
    assert torch.equal(logits_of(other, model, batch), model(batch[0]))


def test_states_of_nested_objectives() -> None:
    model, batch = make_model("classes"), make_batch("classes")

    def make() -> Objective:
        return WeightedSum((1.0, LossCap(ReferenceKL(), 5.0)), (0.5, CrossEntropy()))

    objective = make()
    assert objective.state_dict() == {}
    objective(BatchPass(model, batch))
    move(model)
    value = objective(BatchPass(model, batch))
    assert value.item() > 0
    clone = clone_by_checkpoint(make, objective)
    assert torch.equal(clone(BatchPass(model, batch)), value)
    assert torch.equal(clone_by_pickle(NPO())(BatchPass(model, batch)), NPO()(BatchPass(model, batch)))


class Refuses(Classifier):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("sharded")


def test_what_cannot_be_copied_is_refused() -> None:
    with pytest.raises(HAMUStateError, match="Expected to be able to copy Refuses for the reference, .*: sharded"):
        logits_of(FrozenCopy(), Refuses().double(), make_batch("classes"))
    model = make_model("classes")
    forward = model.forward
    model.forward = lambda x: forward(x)  # type: ignore[method-assign]
    with pytest.raises(HAMUStateError, match="Expected `forward` of Classifier to be a method, but it was replaced"):
        logits_of(FrozenCopy(), model, make_batch("classes"))


def test_a_compiled_module_is_copied_with_its_weights() -> None:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.utilities.compile import from_compiled

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    batch = (torch.randn(3, 4), torch.tensor([0, 1, 2]))
    model = from_compiled(torch.compile(Module(), backend="eager"))
    reference = FrozenCopy()
    before = logits_of(reference, model, batch)
    move(model)
    assert torch.equal(logits_of(reference, model, batch), before)


def test_adapters_are_switched_off_for_the_reference_alone() -> None:
    model, batch = Adapted(make_model("classes")), make_batch("classes")
    model.adapter.data += torch.arange(5.0)
    model.base.eval()
    wrapped = nn.ModuleDict({"model": model})
    modes = [part.training for part in wrapped.modules()]
    with AdaptersDisabled().using(wrapped):
        assert not model.is_on
        assert not any(part.training for part in wrapped.modules())
    assert model.is_on
    assert [part.training for part in wrapped.modules()] == modes
    assert torch.equal(logits_of(AdaptersDisabled(), model, batch), model.base(batch[0]))
    assert AdaptersDisabled().state_dict() == {}
    with pytest.raises(HAMUValueError, match="Expected a module with `disable_adapter`, .* Classifier has none"):
        logits_of(AdaptersDisabled(), make_model("classes"), batch)


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: NPO(**options),
        lambda **options: ReferenceKL(**options),
        lambda **options: UNDIAL(**options),
        lambda **options: DELETE(**options),
        lambda **options: DPO(lambda batch: batch, **options),
        lambda **options: RMURetain("base.body", **options),
    ],
)
def test_shared_weights_keep_their_gradient_under_autocast(make: Callable[..., Objective]) -> None:
    """Autocast keeps 16-bit copies of weights; a pass without gradients must not come before one with them."""
    model, (x, y) = Adapted(Classifier()), make_batch("classes")
    passes = []

    def outputs(module: nn.Module, batch: Any) -> Any:
        passes.append("module" if torch.is_grad_enabled() else "reference")
        return ModuleOutputs()(module, batch)

    with torch.autocast("cpu", torch.bfloat16):
        objective = make(reference=AdaptersDisabled(), outputs=outputs)
        value = objective(BatchPass(model, (x.float(), y)))
    assert passes[:2] == ["module", "reference"]
    assert value.dtype == torch.float32
    if not isinstance(objective, DPO):  # with the same answers preferred and not, it rests
        assert bool(grads(value, model)[1].any())


def test_random_labels_stay_with_the_samples() -> None:
    """In every order and batch, in a copy, and without a look at the global random state."""
    model, (x, y) = make_model("classes"), make_batch("classes")
    state = torch.get_rng_state()
    objective = RandomLabels(3)
    first = objective.samples(BatchPass(model, (x, y)))
    order = torch.tensor([2, 0])
    again = clone_by_pickle(RandomLabels(3)).samples(BatchPass(model, (x[order], y[order])))
    torch.testing.assert_close(again, first[order], atol=1e-12, rtol=0)  # rounding of another batch's products
    assert torch.equal(state, torch.get_rng_state())
    others = [RandomLabels(seed).samples(BatchPass(model, (x, y))) for seed in range(10)]
    assert len({tuple(values.tolist()) for values in others}) > 5


def test_random_labels_are_uniform() -> None:
    n, classes = 4000, 5
    logits = torch.eye(classes).repeat(n // classes, 1) * 0 + torch.arange(classes)
    y = torch.arange(n) % classes
    values = RandomLabels(outputs=lambda module, batch: (logits, y)).samples(BatchPass(nn.Identity(), torch.arange(n)))
    drawn = (values - logits[0].log_softmax(0).unsqueeze(1)).abs().argmin(0)
    table = torch.zeros(classes, classes).index_put_((y, drawn), torch.ones(n), accumulate=True)
    assert not table.diagonal().any()
    off = table[~torch.eye(classes, dtype=torch.bool)]
    assert (off - n / 20).abs().max() < 5 * (n / 20) ** 0.5  # five standard deviations of a count


def test_the_random_teacher_follows_from_its_seed() -> None:
    model, batch = make_model("classes"), make_batch("classes")
    state = torch.get_rng_state()
    teachers = [RandomTeacher(1), RandomTeacher(1), RandomTeacher(2)]
    first, same, other = (logits_of(teacher, model, batch) for teacher in teachers)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    move(model)
    resumed = clone_by_checkpoint(lambda: RandomTeacher(1), teachers[0])
    assert teachers[0].state_dict() == {}
    assert torch.equal(logits_of(resumed, model, batch), first)
    assert torch.equal(logits_of(clone_by_pickle(teachers[0]), model, batch), first)


def test_a_teacher_with_trained_weights_is_refused() -> None:
    model = Adapted(make_model("classes"))
    with pytest.raises(HAMUValueError, match="the weights \\['adapter'\\] have no such layer and would stay"):
        BadTeacher()(BatchPass(model, make_batch("classes")))
