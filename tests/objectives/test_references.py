"""The models that objectives compare with: what they are, cost, and survive."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.objectives import (
    DPO,
    NPO,
    UNDIAL,
    AdaptersDisabled,
    BadTeacher,
    BatchPass,
    CachedLogits,
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
from hamu_lightning.objectives._keys import sample_keys
from tests.objectives.models import Adapted, Classifier, LanguageModel, grads, make_batch, make_model, perturbed

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


@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_stored_logits_equal_live_ones(kind: str, tmp_path: Path) -> None:
    model, batch = make_model(kind), make_batch(kind)
    live = FrozenCopy()
    expected = logits_of(live, model, batch)
    cache = CachedLogits(tmp_path).fill(model, [batch])
    assert model.training
    move(model)
    for reference in (cache, clone_by_pickle(cache), copy.deepcopy(cache), CachedLogits(tmp_path)):
        assert torch.equal(logits_of(reference, model, batch), expected)
        for make in (lambda r: NPO(reference=r), ReferenceKL):
            value, other = make(reference)(BatchPass(model, batch)), make(live)(BatchPass(model, batch))
            assert torch.equal(value, other)
            for one, two in zip(grads(value, model), grads(other, model), strict=True):
                assert torch.equal(one, two)


def test_stored_logits_follow_the_samples_not_the_batches(tmp_path: Path) -> None:
    model, (x, y) = make_model("classes"), make_batch("classes")
    cache = CachedLogits(tmp_path).fill(model, [(x[:2], y[:2]), (x[2:], y[2:])])
    order = torch.tensor([3, 0, 2])
    # In other batches the rounding of the matrix products may differ.
    torch.testing.assert_close(logits_of(cache, model, (x[order], y[order])), model(x[order]), atol=1e-12, rtol=0)
    files = sorted(tmp_path.iterdir())
    move(model)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    CachedLogits(tmp_path).fill(model, [(x[:2], y[:2])])
    assert not calls  # what is there is not computed again
    assert sorted(tmp_path.iterdir()) == files


def test_stored_logits_by_index(tmp_path: Path) -> None:
    model, batch = make_model("tokens"), make_batch("tokens")
    batch["index"] = torch.tensor([3, 1, 4, 0])

    def outputs(module: nn.Module, batch: Any) -> Any:
        return ModuleOutputs()(module, {name: value for name, value in batch.items() if name != "index"})

    cache = CachedLogits(tmp_path, key=lambda batch: batch["index"]).fill(model, [batch], outputs=outputs)
    expected = outputs(model, batch)[0]
    assert torch.equal(cache.logits(BatchPass(model, {"index": torch.tensor([0, 3])}), outputs), expected[[3, 0]])


def test_samples_that_are_not_stored_are_an_error(tmp_path: Path) -> None:
    model, (x, y) = make_model("classes"), make_batch("classes")
    cache = CachedLogits(tmp_path).fill(model, [(x[:3], y[:3])])
    with pytest.raises(HAMUStateError, match="Expected the reference's logits of all 4 samples in .*, but 1 are not"):
        logits_of(cache, model, (x, y))
    with pytest.raises(HAMUStateError, match="Expected a reference that is a model, but CachedLogits holds logits"):
        RMURetain("body", reference=cache)(BatchPass(model, (x, y)))


def test_stored_logits_of_two_lengths_are_an_error(tmp_path: Path) -> None:
    model, batch = make_model("tokens"), make_batch("tokens")
    short = {name: value[:1, :5] for name, value in batch.items()}
    key = lambda b: b["input_ids"][:, 0] * 100 + b["input_ids"].shape[1]  # noqa: E731
    cache = CachedLogits(tmp_path, key=key).fill(model, [batch, short])
    both = {"input_ids": torch.stack([torch.tensor([0, 0]), torch.tensor([0, 0])])}
    cache._key = lambda b: torch.stack([key(batch)[0], key(short)[0]])
    with pytest.raises(HAMUValueError, match="Expected stored logits of one shape in a batch"):
        logits_of(cache, model, both)
    with pytest.raises(HAMUValueError, match="Expected the other model's logits to be of shape \\[4, 6, 7\\]"):
        ReferenceKL(FrozenCopy(LanguageModel().double()), outputs=Shortening())(BatchPass(model, batch))


class Shortening:
    """Gives the second model it is asked for shorter samples."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, batch: Any) -> Any:
        self.calls += 1
        logits, labels = ModuleOutputs()(module, batch)
        return (logits, labels) if self.calls == 1 else (logits[:, 1:], labels[:, 1:])


def test_keys_tell_samples_apart_and_nothing_else() -> None:
    x = torch.randn(1000, 3, 2)
    y = torch.randint(0, 5, (1000,))
    keys = sample_keys({"x": x, "nested": [y, "text"], "scalar": torch.tensor(1.0), "other": torch.ones(3)})
    assert len(set(keys.tolist())) == 1000
    order = torch.randperm(1000)
    assert torch.equal(sample_keys({"x": x[order], "nested": [y[order], "text"], "s": torch.tensor(2.0)}), keys[order])
    x[7, 0, 0] = -x[7, 0, 0]
    assert (sample_keys({"x": x, "nested": [y]}) != keys).nonzero().tolist() == [[7]]
    swapped = sample_keys(torch.tensor([[1, 2], [2, 1], [1, 1], [2, 2]]))
    assert len(set(swapped.tolist())) == 4
    for dtype in (torch.bool, torch.bfloat16, torch.float64, torch.complex64):
        assert len(set(sample_keys(torch.eye(4).to(dtype)).tolist())) == 4, dtype
    with pytest.raises(
        HAMUValueError, match="Expected a batch with tensors, to tell its samples apart, but got a list"
    ):
        sample_keys(["a", "b"])


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
