"""Two processes train a small Llama as one does: DDP and FSDP2, whole and with adapters."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from peft import LoraConfig
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.callbacks import StepOptions
from hamu_lightning.objectives import NPO, WGA, AdaptersDisabled
from hamu_lightning.rules import AdapterRadius, FixedRadius
from hamu_lightning.text import CausalLMModule
from tests.distributed import run_ranks
from tests.text.test_module import QUIET
from tests.text.world import make_model

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
SIZE = 32


class Texts(Dataset[Any]):
    """Sequences with as many labels each, so that means over batches are means over tokens."""

    def __init__(self, seed: int) -> None:
        self.ids = torch.randint(3, SIZE, (8, 6), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "labels": ids.clone().index_fill(0, torch.arange(2), -100)}


class Double(CausalLMModule):
    def __init__(self, lora: Any) -> None:
        super().__init__(make_model(SIZE).double(), lora=lora)
        self.double()
        for part in self.modules():
            if hasattr(part, "attention_dropout"):
                part.attention_dropout = 0.0

    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Sharded(Double):
    @override
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        layers = [part for part in self.modules() if type(part).__name__ == "LlamaDecoderLayer"]
        for layer in (*layers, self.model):
            fully_shard(layer, mesh=mesh)


CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, WGA": {"objective": WGA()},
    "ddp, adapters": {"lora": LORA, "radius": AdapterRadius(1e-2), "objective": NPO(reference=AdaptersDisabled())},
    "fsdp": {"sharded": True},
    "fsdp, WGA": {"sharded": True, "objective": WGA()},
    "fsdp, adapters": {
        "sharded": True,
        "lora": LORA,
        "radius": AdapterRadius(1e-2),
        "objective": NPO(reference=AdaptersDisabled()),
    },
}


def train(
    processes: int, sharded: bool = False, lora: Any = None, objective: Any = None, radius: Any = None
) -> dict[str, Any]:
    torch.manual_seed(0)
    module = (Sharded if sharded and processes > 1 else Double)(lora)
    hamu = HAMUCallback(
        DataLoader(Texts(2), batch_size=4 // processes),
        HAMUQ(1e-2, radius=radius or FixedRadius(0.05)),
        objective=objective,
        steps=StepOptions(exact=True),
    )
    options, sampler = dict(QUIET), None
    if processes > 1:
        strategy = ModelParallelStrategy(processes, 1, process_group_backend="gloo") if sharded else DDPStrategy()
        options |= {"strategy": strategy, "devices": processes}
        sampler = DistributedSampler(Texts(1), processes, dist.get_rank(), shuffle=False)
    loader = DataLoader(Texts(1), batch_size=4 // processes, sampler=sampler)
    Trainer(max_steps=3, num_sanity_val_steps=0, callbacks=[hamu], **options).fit(module, loader)
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return {
        "steps": hamu.combined_steps,
        "gramian": hamu.last_step.gramian.tolist(),  # type: ignore[union-attr]
        "weights": {name: _full(p).tolist() for name, p in weights.items()},
        "sharded": all(isinstance(p, DTensor) for p in weights.values()),
    }


def _full(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def run_cases(rank: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return {name: train(2, **case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(run_cases, 2, timeout=300)


@pytest.mark.slow  # two processes import transformers
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(results: list[dict[str, Any]], name: str) -> None:
    expected = train(1, **CASES[name])
    for result in (r[name] for r in results):
        assert result["sharded"] == CASES[name].get("sharded", False)
        assert result["steps"] == expected["steps"] == 3
        # Float64: sums in another order.
        torch.testing.assert_close(
            torch.tensor(result["gramian"]), torch.tensor(expected["gramian"]), rtol=1e-8, atol=1e-12
        )
        for key, value in expected["weights"].items():
            torch.testing.assert_close(torch.tensor(result["weights"][key]), torch.tensor(value), rtol=0, atol=1e-9)
