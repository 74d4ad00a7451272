"""Sharded weights: FSDP2 and tensor parallelism give what one process gives, and no process sees a full gradient."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.rules import FixedRadius, RelativeRadius
from tests.callbacks.modules import Base, build, fit, make_data
from tests.distributed import run_ranks


class Double(Base):
    """In float64, which the strategy takes from the module only."""

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].double(), batch[1]

    @override
    def make_net(self) -> nn.Module:
        return super().make_net().double()


class Sharded(Double):
    """Each layer's weights are cut over the processes."""

    @override
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for layer in (self.net[0], self.net[2], self.net):  # type: ignore[index]
            fully_shard(layer, mesh=mesh)


class Wide(Sharded):
    """With a weight of 655,360 elements; a piece of a Gramian has at most 262,144."""

    @override
    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(10, 65_536), nn.ReLU(), nn.Linear(65_536, 3)).double()


class Parallel(Double):
    """The first layer is cut by columns, the second by rows: all processes see the same batches."""

    @override
    def configure_model(self) -> None:
        parallelize_module(
            self.net, self.device_mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()}
        )  # type: ignore[index]


class WatchStep(TorchDispatchMode):
    """Notes collectives and the largest tensor that a step makes."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes back with the local tensors, and with the collectives that it takes
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            self.collectives.append(func.__name__)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


class Watch(Callback):
    """Watches the third step."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 2:
            engine, seen = optimizer._core, WatchStep()
            step, self.seen = engine.step, seen

            def watched() -> None:
                with seen:
                    step()
                del engine.step

            engine.step = watched


CASES: dict[str, dict[str, Any]] = {
    "fsdp": {"kind": Sharded},
    "fsdp, optimal, relative": {
        "kind": Sharded,
        "rule": HAMUQ(0.02, radius=RelativeRadius(0.01), allocation="optimal"),
    },
    "fsdp, accumulation, clipping": {"kind": Sharded, "accumulation": 3, "gradient_clip_val": 0.1},
    "fsdp, one forget sample": {"kind": Sharded, "n_forget": 1},
    "fsdp, adamw": {"kind": Sharded, "optimizer": "adamw"},
    "tensor parallel": {"kind": Parallel},
}
WIDE: dict[str, dict[str, Any]] = {
    "fixed radius": {"kind": Wide, "max_steps": 3},
    "relative radius": {"kind": Wide, "max_steps": 3, "rule": HAMUQ(0.02, radius=RelativeRadius(1e-3))},
}


def train(
    processes: int,
    *,
    kind: type[Base],
    rule: Any = HAMUQ(0.02, radius=FixedRadius(0.05)),  # noqa: B008
    accumulation: int = 1,
    n_forget: int = 24,
    optimizer: str = "sgd",
    **settings: Any,
) -> dict[str, Any]:
    module, data, watch = build(kind if processes > 1 else Double, optimizer), make_data(48), Watch()
    data_parallel = processes if issubclass(kind, Sharded) else 1
    size = 12 // data_parallel // accumulation
    hamu = HAMUCallback(DataLoader(make_data(n_forget, seed=9), batch_size=size), rule)
    options: dict[str, Any] = {"max_epochs": 3, "accumulate_grad_batches": accumulation}
    sampler = None
    if processes > 1:
        sizes = {"data_parallel_size": data_parallel, "tensor_parallel_size": processes // data_parallel}
        options |= {"strategy": ModelParallelStrategy(**sizes, process_group_backend="gloo"), "devices": processes}
        sampler = DistributedSampler(data, data_parallel, dist.get_rank() % data_parallel, shuffle=False)
    loader = DataLoader(data, batch_size=size, sampler=sampler)
    fit(module, hamu, watch, loader=loader, **{**options, **settings})
    return {
        "weights": [_full(p).tolist() for p in module.parameters() if p.numel() < 1_000],
        "sharded": all(isinstance(p, DTensor) for p in module.parameters()),
        "gramian": hamu.last_step.gramian.tolist(),  # type: ignore[union-attr]
        "collectives": watch.seen.collectives,
        "largest": watch.seen.largest,
        "steps": hamu.combined_steps,
    }


def _full(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def run_cases(rank: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return {name: train(2, **case) for name, case in (CASES | WIDE).items()}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(run_cases, 2, timeout=300)


@pytest.mark.filterwarnings("ignore:The base optimizer AdamW")
@pytest.mark.parametrize("name", CASES)
def test_shards_are_one_process_on_the_joint_batch(results: list[dict[str, Any]], name: str) -> None:
    expected = train(1, **{**CASES[name], "accumulation": 1})
    for result in (r[name] for r in results):
        assert result["sharded"] or name == "tensor parallel"
        assert result["steps"] == expected["steps"] == 12
        for a, b in zip(result["weights"], expected["weights"], strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=1e-9)
        torch.testing.assert_close(
            torch.tensor(result["gramian"]), torch.tensor(expected["gramian"]), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize(("name", "sums"), [("fixed radius", 1), ("relative radius", 2)])
def test_a_step_gathers_nothing(results: list[dict[str, Any]], name: str, sums: int) -> None:
    """One sum over the processes for the Gramians, one for the weights' norms; half of the largest weight here."""
    for result in (r[name] for r in results):
        assert len(result["collectives"]) == sums and all("allreduce" in c for c in result["collectives"])
        assert result["largest"] == 655_360 // 2
