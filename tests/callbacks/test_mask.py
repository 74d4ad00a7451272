"""A mask in a fit, and the one of SalUn."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, HAMUOptimizer, preflight
from hamu_lightning.callbacks import PassOptions, StepOptions, compute_saliency_mask
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.rules import FixedRadius, GradDiff, RelativeRadius
from tests.callbacks.modules import MODULES, Base, WithBatchNorm, build, fit, make_data
from tests.callbacks.passes.test_invariants import attributes
from tests.callbacks.test_checkpoints import assert_same, end_of
from tests.callbacks.test_checkpoints import train as train_and_save
from tests.callbacks.test_model_parallel import Sharded
from tests.distributed import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The base optimizer"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
RULE = HAMUQ(0.02, radius=FixedRadius(0.05))


def forget_loader(n: int = 40) -> DataLoader[Any]:
    return DataLoader(make_data(n, seed=9), batch_size=16)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_rest(module: nn.Module, before: dict[str, Tensor], mask: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter[~mask[name]], before[name][~mask[name]]), name
        assert not mask[name].any() or not torch.equal(parameter[mask[name]], before[name][mask[name]]), name


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate_grad_batches": 4}, {"precision": "16-mixed"}, {"gradient_clip_val": 0.1}, {"every_n_steps": 2}],
    ids=str,
)
@pytest.mark.parametrize("verify", [False, True])
def test_weights_outside_rest(optimizer: str, settings: dict[str, Any], verify: bool) -> None:
    module = build(Base, optimizer)
    before, mask = weights_of(module), compute_saliency_mask(module, forget_loader(), keep=0.5)
    every = settings.get("every_n_steps", 1)
    hamu = HAMUCallback(
        forget_loader(), RULE, steps=StepOptions(mask=mask), verify=verify, passes=PassOptions(every_n_steps=every)
    )
    fit(module, hamu, **{name: value for name, value in settings.items() if name != "every_n_steps"})
    assert hamu.combined_steps > 0
    assert_rest(module, before, mask)


def test_salun_is_a_loop_in_plain_pytorch() -> None:
    """Its mask by one gradient over all forget data, its steps by multiplying gradients (here: of GradDiff)."""
    module = build(Base).double()
    twin, data = copy.deepcopy(module), make_data(40, seed=9)
    x, y = data.tensors
    names, parameters = zip(*twin.named_parameters(), strict=True)
    saliency = [g.abs() for g in torch.autograd.grad(cross_entropy(twin(x.double()), y), parameters)]
    flat = torch.cat([s.flatten() for s in saliency])
    threshold = flat.sort(descending=True).values[round(0.5 * len(flat)) - 1]
    expected = {name: s >= threshold for name, s in zip(names, saliency, strict=True)}
    doubled = DataLoader(TensorDataset(x.double(), y), batch_size=16)  # 16, 16 and 8 samples
    mask = compute_saliency_mask(module, doubled)
    assert all(torch.equal(mask[name], expected[name]) for name in names)

    hamu = HAMUCallback(forget_loader(), GradDiff(0.5), steps=StepOptions(mask=mask))
    fit(module, hamu, loader=DataLoader(make_data(), batch_size=16), max_epochs=1, precision="64-true")
    for (x, y), (u, v) in zip(DataLoader(make_data(), batch_size=16), [*forget_loader()] * 2, strict=True):
        loss = cross_entropy(twin(x.double()), y) - 0.5 * cross_entropy(twin(u.double()), v)
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for name, parameter, grad in zip(names, parameters, grads, strict=True):
                parameter -= 0.05 * (expected[name] * grad)
    for weight, other in zip(module.parameters(), parameters, strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-12)  # float64; 6 steps of rounding


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("batchnorm", ["freeze", "retain"])
def test_the_saliency_mask_leaves_no_trace(kind: type[Base], batchnorm: Any) -> None:
    module = build(kind)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    state, own, modes = copy.deepcopy(module.state_dict()), attributes(module), [m.training for m in module.modules()]
    shuffled = DataLoader(make_data(40, seed=9), batch_size=16, shuffle=True)
    random = torch.get_rng_state()
    mask = compute_saliency_mask(module, shuffled, keep=0.2, batchnorm=batchnorm)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert attributes(module) == own
    assert [m.training for m in module.modules()] == modes
    assert all((p.grad == 1).all() for p in module.parameters())  # type: ignore[union-attr]
    trainable = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
    assert {name: part.shape for name, part in mask.items()} == trainable
    total = sum(part.numel() for part in mask.values())
    assert sum(int(part.sum()) for part in mask.values()) == round(0.2 * total)
    again = compute_saliency_mask(module, shuffled, keep=0.2, batchnorm=batchnorm)
    assert all(torch.equal(mask[name], again[name]) for name in mask)


def test_batchnorm_is_frozen_by_default() -> None:
    module = build(WithBatchNorm)
    masks = [compute_saliency_mask(module, forget_loader(), batchnorm=b) for b in ("freeze", "retain")]  # type: ignore[arg-type]
    assert any(not torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


class Silent(Base):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx != 1 else super().training_step(batch, batch_idx)


def test_each_batch_counts_once() -> None:
    """Those without a loss are not replaced by others."""
    module = build(Silent)
    (x, y) = [*forget_loader()][1]
    grads = torch.autograd.grad(cross_entropy(module(x), y), list(module.parameters()))
    threshold = torch.cat([g.abs().flatten() for g in grads]).sort(descending=True).values[19]
    mask = compute_saliency_mask(module, forget_loader(), keep=20 / sum(g.numel() for g in grads))
    assert all(torch.equal(m, g.abs() >= threshold) for m, g in zip(mask.values(), grads, strict=True))


def test_refusals() -> None:
    module = build(Base)
    with pytest.raises(HAMUValueError, match="Expected `module` to have a `training_step"):
        compute_saliency_mask(nn.Linear(2, 2), forget_loader())
    with pytest.raises(HAMUValueError, match="Expected `forget_loader` to have a length"):
        compute_saliency_mask(module, _Endless())
    with pytest.raises(HAMUValueError, match="Expected `batchnorm` to be one of 'freeze', 'retain', but got 'thaw'"):
        compute_saliency_mask(module, forget_loader(), batchnorm="thaw")  # type: ignore[arg-type]
    with pytest.raises(HAMUStateError, match="it returned None for all forget data"):
        compute_saliency_mask(build(Silent), forget_loader(16))
    with pytest.raises(MisconfigurationException, match="or their names, but got 'weight'"):
        fit(module, HAMUCallback(forget_loader(), RULE, steps=StepOptions(mask={"weight": torch.ones(2) > 0})))


class _Endless:
    def __iter__(self) -> Any:
        return iter(forget_loader())


def test_the_preflight_sees_the_problem_of_the_mask() -> None:
    module = build(Base)
    mask = compute_saliency_mask(module, forget_loader(), keep=0.1)
    (x, y), parameters = next(iter(forget_loader(16))), list(module.parameters())
    grads = torch.autograd.grad(cross_entropy(module(x), y), parameters)
    expected = float(sum((g * m).double().square().sum() for g, m in zip(grads, mask.values(), strict=True)).sqrt())  # type: ignore[union-attr]
    retain, forget = DataLoader(make_data(16), batch_size=16), forget_loader(16)
    alone = preflight(module, retain, forget, RULE, mask=mask)
    hamu = HAMUCallback(forget, RULE, steps=StepOptions(mask=mask), preflight=True)
    fit(module, hamu, loader=retain, max_epochs=1)
    for report in (alone, hamu.preflight_report):
        assert report is not None
        assert report.estimates["forget_norm"].mean == pytest.approx(expected, rel=1e-5)  # gradients in float32


class OwnOptimizer(Base):
    @override
    def configure_optimizers(self) -> Any:
        return HAMUOptimizer(torch.optim.SGD(self.parameters(), lr=0.1), RULE)


def test_a_mask_is_never_ignored() -> None:
    module = build(OwnOptimizer)
    mask = compute_saliency_mask(build(Base), forget_loader())
    with pytest.raises(MisconfigurationException, match=r"Expected a plain optimizer with `mask`"):
        fit(module, HAMUCallback(forget_loader(), RULE, steps=StepOptions(mask=mask)))


def test_the_mask_survives_a_resumed_run(tmp_path: Path) -> None:
    """It is no part of the checkpoint: it is given again."""
    module = build(Base, "momentum")
    mask = compute_saliency_mask(module, forget_loader())
    settings: dict[str, Any] = {"optimizer": "momentum", "arguments": {"steps": StepOptions(mask=mask)}}
    trainer, hamu = train_and_save(tmp_path, **settings)
    whole = end_of(trainer, hamu)
    assert_rest(trainer.lightning_module, weights_of(module), mask)
    assert_same(whole, end_of(*train_and_save(tmp_path, resume=True, **settings)))


def train(processes: int, optimizer: str) -> dict[str, Any]:
    module, data = build(Base, optimizer), make_data(48)
    mask = compute_saliency_mask(module, forget_loader())
    rule = HAMUQ(0.02, radius=RelativeRadius(0.01))
    hamu = HAMUCallback(
        DataLoader(make_data(24, seed=9), batch_size=12 // processes), rule, steps=StepOptions(mask=mask)
    )
    options: dict[str, Any] = {"precision": "64-true"}
    if processes > 1:
        strategy = DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True)
        options |= {"strategy": strategy, "devices": processes}
    sampler = DistributedSampler(data, shuffle=False) if processes > 1 else None
    fit(module, hamu, loader=DataLoader(data, batch_size=12 // processes, sampler=sampler), **options)
    return {"weights": [p.detach().tolist() for p in module.parameters()], "mask": [m.tolist() for m in mask.values()]}


def train_sharded() -> str:
    module = build(Sharded)
    mask = {name: torch.ones(p.shape) > 0 for name, p in module.named_parameters()}
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    try:
        fit(module, HAMUCallback(forget_loader(), RULE, steps=StepOptions(mask=mask)), strategy=strategy, devices=2)
    except MisconfigurationException as error:
        return str(error)
    return ""


def run_cases(rank: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return {"sgd": train(2, "sgd"), "adamw": train(2, "adamw"), "sharded": train_sharded()}


def test_two_processes() -> None:
    """With DDP as one process on the joint batch; sharded weights are refused."""
    for result in run_ranks(run_cases, 2, timeout=300):
        for optimizer in ("sgd", "adamw"):
            expected = train(1, optimizer)
            assert result[optimizer]["mask"] == expected["mask"]
            for a, b in zip(result[optimizer]["weights"], expected["weights"], strict=True):
                # Float64, where only the order of sums differs.
                torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=1e-9)
        assert "Expected whole tensors with `mask`, but net.0.weight is a DTensor" in result["sharded"]
