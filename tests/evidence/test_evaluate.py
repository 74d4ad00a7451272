"""What a model says of each sample, against a plain loop over samples, and that looking leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from typing_extensions import override

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.evidence import Evaluation, evaluate
from tests.callbacks.modules import MODULES, Base, WithBatchNorm, build, make_data

RETAIN, FORGET, HOLDOUT = make_data(50), make_data(20, seed=1), make_data(30, seed=2)


def loop(module: LightningModule, data: Dataset[Any]) -> Tensor:
    """The cross-entropy of each sample, one after the other, in evaluation mode."""
    twin = copy.deepcopy(module).eval()
    pairs = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
    with torch.no_grad():
        return torch.stack([-twin(x[None]).double().log_softmax(1)[0, y] for x, y in pairs])


def losses_of(found: Evaluation, name: str = "forget") -> Tensor:
    return found.parts[name].losses


class Dropping(Base):
    @override
    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Dropout(), super().make_net())


@pytest.mark.parametrize("kind", [Base, WithBatchNorm, Dropping])
def test_losses_are_those_of_a_loop_over_samples(kind: type[Base]) -> None:
    module = build(kind)
    loader = DataLoader(RETAIN, batch_size=16, shuffle=True, drop_last=True)
    found = evaluate(module, {"retain": loader, "forget": FORGET, "holdout": HOLDOUT})
    for name, data in {"retain": RETAIN, "forget": FORGET, "holdout": HOLDOUT}.items():
        part = found.parts[name]
        # In batches sums run in another order than one by one, in float32.
        assert torch.allclose(part.losses, loop(module, data), atol=1e-5)
        assert part.ids.tolist() == [*range(len(data))] and part.losses.dtype == torch.float64
        assert part.labels is not None and part.log_probs is not None
        assert torch.equal(part.labels, data.tensors[1])
        assert part.recognised.tolist() == (part.log_probs.argmax(1) == part.labels).double().tolist()
    assert found.is_whole


def test_ids_are_positions_in_the_dataset() -> None:
    module = build(Base)
    subset = Subset(RETAIN, [7, 3, 11])
    sampled = DataLoader(RETAIN, batch_size=2, sampler=torch.utils.data.SubsetRandomSampler([4, 9, 2]))
    found = evaluate(module, {"retain": sampled, "forget": DataLoader(subset, shuffle=True)})
    assert found.parts["forget"].ids.tolist() == [0, 1, 2] and found.parts["retain"].ids.tolist() == [4, 9, 2]
    everything = loop(module, RETAIN)
    assert torch.allclose(losses_of(found), everything[[7, 3, 11]], atol=1e-5)
    assert torch.allclose(losses_of(found, "retain"), everything[[4, 9, 2]], atol=1e-5)


class Stream(IterableDataset[Any]):
    @override
    def __iter__(self) -> Any:
        return iter([FORGET[i] for i in range(20)])


def make_sampler() -> Any:
    return torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(FORGET), 6, drop_last=True)


class OwnBatches:
    """Batches of a sampler's own making, shuffled."""

    def __iter__(self) -> Any:
        return iter([[3, 1], [0, 2, 19]])

    def __len__(self) -> int:
        return 2


SOURCES: dict[str, Any] = {
    "batches": lambda: [*DataLoader(FORGET, batch_size=8)],
    "stream": lambda: DataLoader(Stream(), batch_size=8),
    "batch sampler": lambda: DataLoader(FORGET, batch_sampler=make_sampler()),
    "a sampler's own batches": lambda: DataLoader(FORGET, batch_sampler=OwnBatches()),  # type: ignore[arg-type]
    "ready batches": lambda: DataLoader([*DataLoader(FORGET, batch_size=8)], batch_size=None),  # type: ignore[arg-type]
    "workers": lambda: DataLoader(FORGET, batch_size=8, num_workers=1, shuffle=True),
}


@pytest.mark.parametrize("name", SOURCES)
def test_each_sample_is_read_once_and_in_order(name: str) -> None:
    module = build(Base)
    found = evaluate(module, {"forget": SOURCES[name]()})
    assert torch.allclose(losses_of(found), loop(module, FORGET), atol=1e-5)
    assert found.parts["forget"].ids.tolist() == [*range(20)] and found.is_whole


def test_a_part_is_spread_over_the_set() -> None:
    module = build(Base)
    whole = evaluate(module, {"forget": DataLoader(RETAIN, batch_size=5)})
    part = evaluate(module, {"forget": DataLoader(RETAIN, batch_size=5)}, max_batches=2)
    ids = part.parts["forget"].ids
    assert ids.tolist() == [10, 11, 12, 13, 14, 35, 36, 37, 38, 39] and not part.is_whole
    assert torch.allclose(losses_of(part), losses_of(whole)[ids], atol=1e-6)
    assert evaluate(module, {"forget": DataLoader(RETAIN, batch_size=5)}, max_batches=10).is_whole
    batches = evaluate(module, {"forget": SOURCES["batches"]()}, max_batches=2)
    assert len(batches.parts["forget"]) == 16 and not batches.is_whole
    assert not evaluate(module, {"forget": SOURCES["stream"]()}, max_batches=2).is_whole


@pytest.mark.parametrize("kind", MODULES)
def test_nothing_is_left_behind(kind: type[Base]) -> None:
    module = build(kind)
    module.train()
    module.net[0].eval() if isinstance(module.net, nn.Sequential) else None
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    state, modes = copy.deepcopy(module.state_dict()), [part.training for part in module.modules()]
    attributes, random = set(vars(module)), torch.get_rng_state()
    data = DataLoader(FORGET, batch_size=10, shuffle=True)
    data_before = copy.deepcopy(FORGET.tensors)
    try:
        evaluate(module, {"forget": data})
    except HAMUValueError:
        assert kind.__name__ == "StatefulLSTM"  # it has no `forward` of a batch, and one sample is no batch for it
    assert torch.equal(torch.get_rng_state(), random) and set(vars(module)) == attributes
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert [part.training for part in module.modules()] == modes
    assert all(bool((p.grad == 1).all()) for p in module.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in module.parameters())
    assert all(map(torch.equal, FORGET.tensors, data_before))


class Differentiates(Base):
    """Takes gradients inside of its step, and leaves them; edits its batch on the way to the device."""

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch[0].mul_(2)
        return batch

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self(batch[0]).sum().backward()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("inference", [False, True])
def test_a_step_that_differentiates_leaves_no_gradient(inference: bool) -> None:
    module, batches = build(Differentiates), [*DataLoader(FORGET, batch_size=8)]
    before = copy.deepcopy(batches)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.inference_mode(inference):  # as in validation
        found = evaluate(module, {"forget": batches})
    doubled = TensorDataset(2 * FORGET.tensors[0], FORGET.tensors[1])
    assert torch.allclose(losses_of(found), loop(module, doubled), atol=1e-5)
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in module.parameters())
    assert all(
        torch.equal(x, y) for one, other in zip(batches, before, strict=True) for x, y in zip(one, other, strict=True)
    )


def test_samples_without_a_label_are_left_out() -> None:
    x, y = make_data(10).tensors
    y = y.clone()
    y[3] = -100
    part = evaluate(build(Base), {"forget": TensorDataset(x, y)}).parts["forget"]
    assert part.ids.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]


class Doubles(LightningDataModule):
    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return 2 * batch[0], batch[1]


class Halves(Base):
    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] / 2, batch[1]


def test_batches_take_the_hooks_of_datamodule_or_module() -> None:
    module = build(Base)
    doubled = TensorDataset(2 * FORGET.tensors[0], FORGET.tensors[1])
    halved = TensorDataset(FORGET.tensors[0] / 2, FORGET.tensors[1])
    found = evaluate(module, {"forget": FORGET}, datamodule=Doubles())
    assert torch.allclose(losses_of(found), loop(module, doubled), atol=1e-5)
    assert torch.allclose(losses_of(evaluate(build(Halves), {"forget": FORGET})), loop(module, halved), atol=1e-5)
    found = evaluate(build(Halves), {"forget": FORGET}, datamodule=Doubles())
    assert torch.allclose(losses_of(found), loop(module, doubled), atol=1e-5)


class Noisy(Dataset[Any]):
    def __init__(self, transform: Any = None) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 20

    @override
    def __getitem__(self, index: int) -> Any:
        return FORGET[index]


def test_different_transforms_are_told() -> None:
    module = build(Base)
    with pytest.warns(UserWarning, match="forget set and the holdout data go through different transforms"):
        evaluate(module, {"forget": Noisy(abs), "holdout": Noisy(round)})
    with pytest.warns(UserWarning, match="forget set and the test data go"):
        evaluate(module, {"forget": Noisy(abs), "test": Noisy(round)})
    evaluate(module, {"forget": Noisy(abs), "holdout": Noisy(abs), "retain": Noisy(round)})


class AsksForTrainer(Base):
    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.trainer.max_epochs


def test_what_cannot_be_measured_is_refused() -> None:
    module = build(Base)
    with pytest.raises(HAMUValueError, match="'retian'"):
        evaluate(module, {"forget": FORGET, "retian": RETAIN})
    with pytest.raises(HAMUValueError, match="Expected the data to forget"):
        evaluate(module, {"retain": RETAIN})
    with pytest.raises(HAMUValueError, match="'forget' to be a Dataset"):
        evaluate(module, {"forget": FORGET.tensors[0]})  # type: ignore[dict-item]
    with pytest.raises(HAMUValueError, match="hold at least one sample"):
        evaluate(module, {"forget": []})
    with pytest.raises(HAMUValueError, match="max_batches"):
        evaluate(module, {"forget": FORGET}, max_batches=0)
    with pytest.raises(HAMUValueError, match="Expected to find the loss of each sample.*Pass `outputs=`"):
        evaluate(module, {"forget": [torch.ones(2, 10)]})
    with pytest.raises(HAMUStateError, match="EvaluateUnlearning"):
        evaluate(build(AsksForTrainer), {"forget": FORGET})
    with pytest.raises(HAMUValueError, match="form of the first one"):
        evaluate(module, {"forget": FORGET, "retain": [(torch.ones(2, 10), torch.ones(2, 3))]})


def test_own_outputs_are_asked() -> None:
    module = build(Base)
    batches = [{"image": x, "target": y} for x, y in DataLoader(FORGET, batch_size=8)]
    with pytest.warns(UserWarning, match="not known"):  # its step takes no such batch
        found = evaluate(module, {"forget": batches}, outputs=lambda m, b: (m(b["image"]), b["target"]))
    assert torch.allclose(losses_of(found), loop(module, FORGET), atol=1e-5)
