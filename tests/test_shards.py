"""Gramians and steps of sharded gradients: two processes know what one would know, with one collective."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import SGD

from hamu_lightning.gramian import compute_gramian
from hamu_lightning.optim import HAMUOptimizer
from hamu_lightning.rules import HAMUQ, RelativeRadius
from tests.distributed import run_ranks

SHAPES = ((4, 3), (5,), (6, 2))


def full_tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def distribute(tensors: list[torch.Tensor], mesh: Any) -> list[Any]:
    """The first sharded evenly, the second unevenly; the third the same on all ranks."""
    placements = ([Shard(0)], [Shard(0)], [Replicate()])
    return [distribute_tensor(t, mesh, p) for t, p in zip(tensors, placements, strict=True)]


def sharded_gramian(rank: int) -> tuple[Any, int]:
    mesh = init_device_mesh("cpu", (2,))
    grads = [distribute(full_tensors(seed), mesh) for seed in (0, 1)]
    calls, all_reduce = [], torch.distributed.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return all_reduce(*args, **kwargs)

    torch.distributed.all_reduce = counting
    plain = torch.full((3,), 2.0, dtype=torch.float64)  # beside them a tensor that no mesh knows
    gramian = compute_gramian([*grads[0], plain], [*grads[1], plain], blocks=[0, 1, 1, 2])
    return gramian.tolist(), len(calls)


def test_gramian_of_shards() -> None:
    plain = torch.full((3,), 2.0, dtype=torch.float64)
    expected = compute_gramian([*full_tensors(0), plain], [*full_tensors(1), plain], blocks=[0, 1, 1, 2])
    for gramian, collectives in run_ranks(sharded_gramian, 2):
        torch.testing.assert_close(torch.tensor(gramian, dtype=torch.float64), expected)
        assert collectives == 1


def step(parameters: list[Any], grads: list[list[Any]]) -> HAMUOptimizer:
    optimizer = HAMUOptimizer(SGD(parameters, lr=0.1), HAMUQ(0.3, radius=RelativeRadius(0.1)))
    for context, values in ((optimizer.forget, grads[1]), (optimizer.retain, grads[0])):
        with context():
            for parameter, grad in zip(parameters, values, strict=True):
                parameter.grad = grad
    optimizer.step()
    return optimizer


def sharded_step(rank: int) -> list[Any]:
    mesh = init_device_mesh("cpu", (2,))
    parameters = [torch.nn.Parameter(p) for p in distribute(full_tensors(7), mesh)]
    step(parameters, [distribute(full_tensors(seed), mesh) for seed in (0, 1)])
    assert all(isinstance(p, DTensor) for p in parameters)
    return [p.full_tensor().tolist() for p in parameters]


def test_step_of_shards() -> None:
    parameters = [torch.nn.Parameter(p) for p in full_tensors(7)]
    step(parameters, [full_tensors(seed) for seed in (0, 1)])
    for result in run_ranks(sharded_step, 2):
        for values, expected in zip(result, parameters, strict=True):
            torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), expected.detach())
