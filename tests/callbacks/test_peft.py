"""Adapters of PEFT on a small Llama: found, measured by the weights that they make, and as references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.objectives import NPO, AdaptersDisabled, BatchPass, FrozenCopy, SecondAdapter
from hamu_lightning.rules import AdapterRadius, find_adapters
from tests.callbacks.modules import Base, fit

peft = pytest.importorskip("peft", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)

# PEFT calls what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Sentences(Dataset[Any]):
    def __init__(self, seed: int) -> None:
        self.ids = torch.randint(0, 16, (8, 6), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Llama(Base):
    def make_net(self) -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=16, max_position_embeddings=8, **sizes)
        targets = ["q_proj", "down_proj", "embed_tokens"]
        lora = peft.LoraConfig(r=3, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")
        return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)

    def forward(self, **batch: Any) -> Any:
        return self.net(**batch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(**batch).loss


def dense(module: Llama) -> dict[str, torch.Tensor]:
    """The weights with the adapters in them, as PEFT itself merges them."""
    model = module.net.base_model
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    return {n: (m.get_base_layer().weight + m.get_delta_weight("default")).detach() for n, m in layers.items()}


def test_adapters_are_found() -> None:
    module = Llama()
    found = find_adapters(module)
    assert len(found) == 5  # two layers of a block, two blocks, one embedding
    assert {a.scaling for a in found} == {4.0}
    assert {tuple(a.base.shape) for a in found} == {(16, 16), (16, 24)}


def test_steps_are_measured_by_the_weights() -> None:
    module = Llama()
    norm = math.sqrt(sum(float(a.base_norm()) ** 2 for a in find_adapters(module)))
    weights, shares = dense(module), []

    def note(*_: Any) -> None:
        nonlocal weights
        before, weights = weights, dense(module)
        shares.append(math.sqrt(sum(float((weights[n] - before[n]).square().sum()) for n in before)) / norm)

    module.on_train_batch_end = note  # type: ignore[method-assign]
    rule = HAMUQ(1e3, radius=AdapterRadius(0.01), blocks="global")
    hamu = HAMUCallback(DataLoader(Sentences(1), batch_size=4), rule)
    fit(module, hamu, loader=DataLoader(Sentences(2), batch_size=4), max_epochs=-1, max_steps=6)
    assert len(shares) == 6
    assert all(1e-4 < share <= 0.01 * (1 + 1e-4) for share in shares)  # float32


def test_references() -> None:
    """Another adapter with the weights of the trained one, and none: each where it is the model before unlearning."""
    module, batch = Llama(), {n: torch.stack([s[n] for s in Sentences(3)]) for n in ("input_ids", "labels")}
    module.net.add_adapter("original", module.net.peft_config["default"])
    parts = {n: p for n, p in module.net.named_parameters() if ".default" in n or ".original" in n}
    for name, parameter in parts.items():
        if ".original" in name:
            parameter.data.copy_(parts[name.replace(".original", ".default")])
    expected = NPO(reference=FrozenCopy())(BatchPass(module, batch))
    for reference in (AdaptersDisabled(), SecondAdapter("original")):
        objective = NPO(reference=reference)
        objective.expect_start()
        value = objective(BatchPass(module, batch))
        torch.testing.assert_close(value, expected)
        value.backward()
    assert {n for n, p in parts.items() if p.grad is not None} == {n for n in parts if ".default" in n}
    assert module.net.active_adapter == "default"
