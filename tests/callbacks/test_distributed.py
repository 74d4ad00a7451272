"""Several processes with DistributedDataParallel: the answer of one process on the joint batches."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from hamu_lightning import HAMUQ, HAMUU, HAMUCallback
from hamu_lightning.rules import FixedRadius, RelativeRadius, Rule
from tests.callbacks.modules import Base, build, fit, make_data
from tests.distributed import run_ranks

RULE = HAMUQ(0.02, radius=FixedRadius(0.05))


class HasUnused(Base):
    """A layer that no loss uses."""

    def make_net(self) -> nn.Module:
        self.unused = nn.Linear(2, 2)
        return super().make_net()


def train(
    processes: int,
    *,
    rule: Rule = RULE,
    kind: type[Base] = Base,
    accumulation: int = 1,
    n_forget: int = 24,
    strategy: dict[str, Any] | None = None,
    callback: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train on joint batches of 12 retain and up to 12 forget samples; return what there is at the end."""
    module = build(kind)
    size = 12 // processes // accumulation
    hamu = HAMUCallback(DataLoader(make_data(n_forget, seed=9), batch_size=size), rule, **(callback or {}))
    options: dict[str, Any] = {"max_epochs": 5, "precision": "64-true", "accumulate_grad_batches": accumulation}
    if processes > 1:
        options |= {"strategy": DDPStrategy(process_group_backend="gloo", **(strategy or {})), "devices": processes}
    data = make_data(48)
    # Lightning would shuffle in the training stage; the forget loader is left to be sharded by the callback.
    sampler = DistributedSampler(data, shuffle=False) if processes > 1 else None
    loader = DataLoader(data, batch_size=size, sampler=sampler)
    trainer, _ = fit(module, hamu, loader=loader, **{**options, **settings})
    return {
        "weights": [p.detach().tolist() for p in module.parameters()],
        "gramian": None if hamu.last_step is None else hamu.last_step.gramian.tolist(),
        "steps": hamu.combined_steps,
        "passes": hamu.forget_passes,
        "reason": hamu.stop_reason,
        "forget loss": float(trainer.callback_metrics.get("forget/loss", torch.nan)),
        "global step": trainer.global_step,
    }


STRICT = HAMUQ(0.02, radius=FixedRadius(1e-6))  # which cannot be had
CASES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "the paper's radius": {"rule": HAMUQ(1e-3)},
    "relative radius": {"rule": HAMUQ(0.02, radius=RelativeRadius(0.01), allocation="optimal")},
    "hamu-u": {"rule": HAMUU(0.005, radius=FixedRadius(0.05))},
    "accumulation": {"accumulation": 3},
    "bucket view": {"strategy": {"gradient_as_bucket_view": True}},
    "bucket view, accumulation": {"strategy": {"gradient_as_bucket_view": True}, "accumulation": 3},
    "static graph": {"strategy": {"static_graph": True}},
    "unused parameters": {"kind": HasUnused, "strategy": {"find_unused_parameters": True}},
    "clipping": {"gradient_clip_val": 0.1},
    "uneven forget shards": {"n_forget": 3},
    "an empty forget shard": {"n_forget": 1},
    "an empty forget shard, accumulation": {"n_forget": 1, "accumulation": 3},
    "stop": {"rule": STRICT, "callback": {"stop_on": ["infeasible"]}},
}


def run_cases(rank: int) -> dict[str, dict[str, Any]]:
    warnings.simplefilter("ignore")
    return {name: train(2, **case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def results() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(run_cases, 2, timeout=300)


def to_tensor(weights: list[Any]) -> Tensor:
    return torch.cat([torch.tensor(w, dtype=torch.float64).flatten() for w in weights])


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_on_the_joint_batch(results: list[dict[str, dict[str, Any]]], name: str) -> None:
    """20 steps in float64, where only the order of sums differs; one process does not accumulate either."""
    case = {key: value for key, value in CASES[name].items() if key != "strategy"}
    case.pop("accumulation", None)
    expected = train(1, **case)
    first, second = (result[name] for result in results)
    assert first["weights"] == second["weights"]
    assert first["steps"] == second["steps"] == expected["steps"] == first["global step"] - (name == "stop")
    torch.testing.assert_close(to_tensor(first["weights"]), to_tensor(expected["weights"]), rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.tensor(first["gramian"]), torch.tensor(expected["gramian"]), rtol=1e-9, atol=1e-12)
    assert first["forget loss"] == pytest.approx(expected["forget loss"], rel=1e-6, nan_ok=True)


def test_all_processes_stop_for_the_same_reason(results: list[dict[str, dict[str, Any]]]) -> None:
    reasons = [result["stop"]["reason"] for result in results]
    assert reasons[0] == reasons[1] and "infeasible" in reasons[0]
    assert results[0]["stop"]["global step"] == 1
