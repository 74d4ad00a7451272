"""CausalLMModule against a plain loop of transformers, and what it trains, saves and refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.callbacks import StepOptions
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.objectives import NPO, BatchPass, CrossEntropy, ModuleOutputs
from hamu_lightning.rules import RelativeRadius
from hamu_lightning.text import CausalLMModule, QAData
from tests.text.world import make_model

# Steps are called without a Trainer here.
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def loss_by_hand(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The sum over answer tokens of -log p, token by token, and their number."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total, count = torch.zeros(()), 0
    for n, row in enumerate(batch["labels"]):
        for t in range(1, len(row)):
            if row[t] != -100:
                total = total - logits[n, t - 1].log_softmax(dim=-1)[row[t]]
                count += 1
    return total, count


def test_loss_and_gradients_are_those_of_a_plain_loop(module: CausalLMModule, data: QAData) -> None:
    module.model.eval()  # without dropout the two passes are the same
    batch = next(iter(data.train_dataloader()))
    loss = module.training_step(batch)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    total, count = loss_by_hand(module.model, batch)
    (total / count).backward()
    # Float32: sums in another order.
    assert loss.item() == pytest.approx((total / count).item(), abs=1e-6)
    assert ours
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(ours[name], parameter.grad, atol=1e-6), name


def test_micro_batches_give_the_gradient_of_the_mean_over_all_tokens(module: CausalLMModule, data: QAData) -> None:
    module.model.eval()
    batches = list(data.val_dataloader()) + list(data.forget_dataloader())
    sums = [loss_by_hand(module.model, batch) for batch in batches]
    tokens = sum(count for _, count in sums)
    # What Lightning does with an accumulation of so many batches.
    module.tokens_per_batch = tokens / len(batches)
    ours = sum(module.training_step(batch) for batch in batches) / len(batches)
    assert ours.item() == pytest.approx(sum(total.item() for total, _ in sums) / tokens, abs=1e-6)


def test_objectives_understand_the_batches(module: CausalLMModule, data: QAData) -> None:
    module.model.eval()
    batch = next(iter(data.forget_dataloader()))
    logits, labels = ModuleOutputs()(module, batch)
    assert logits.shape[:2] == labels.shape
    each = [loss_by_hand(module.model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(2)]
    found = CrossEntropy().samples(BatchPass(module, batch))
    assert found.tolist() == pytest.approx([total.item() / count for total, count in each], abs=1e-6)


def test_models_are_trained_in_training_mode(tmp_path: Path, tokenizer: Any) -> None:
    make_model(len(tokenizer)).save_pretrained(tmp_path)
    module = CausalLMModule(tmp_path)
    assert all(part.training for part in module.modules())
    assert module.model.config.use_cache is False
    assert CausalLMModule(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16


@pytest.mark.parametrize("objective", [None, NPO(beta=0.1)], ids=["loss", "npo"])
def test_three_steps_of_unlearning(module: CausalLMModule, data: QAData, objective: Any) -> None:
    before = copy.deepcopy(module.state_dict())
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    rule = HAMUQ(quota=1e-3, radius=RelativeRadius(1e-2, floor=1.0))
    callback = HAMUCallback(rule=rule, objective=objective, steps=StepOptions(exact=True))
    Trainer(max_steps=3, num_sanity_val_steps=0, callbacks=[callback], **QUIET).fit(module, datamodule=data)
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and moved <= trained
    assert all(p.requires_grad == (name in trained) for name, p in module.named_parameters())


@pytest.mark.filterwarnings("ignore:The weights are bfloat16:UserWarning")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_and_checkpointing_of_activations(data: QAData, tokenizer: Any, precision: Any) -> None:
    module = CausalLMModule(make_model(len(tokenizer)), lora=LORA, gradient_checkpointing=True)
    assert any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
    hamu = HAMUCallback(rule=HAMUQ(quota=1e-3), steps=StepOptions(exact=True))
    Trainer(max_steps=2, precision=precision, callbacks=[hamu], **QUIET).fit(module, datamodule=data)
    assert all(p.isfinite().all() for p in module.parameters())
    assert (next(module.parameters()).dtype == torch.bfloat16) == (precision == "bf16-true")


def test_checkpointing_of_activations_changes_no_gradient(data: QAData, tokenizer: Any) -> None:
    batch = next(iter(data.val_dataloader()))
    found = []
    for is_on in (False, True):
        model = make_model(len(tokenizer))
        model.config.attention_dropout = 0.0
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        module = CausalLMModule(model, gradient_checkpointing=is_on)
        module.training_step(batch).backward()
        found.append([p.grad for p in module.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))  # rounding


def test_the_optimizer_gets_what_is_trained_alone(module: CausalLMModule) -> None:
    (group,) = module.configure_optimizers().param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters() if p.requires_grad}


def test_a_checkpoint_of_adapters_alone(tmp_path: Path, data: QAData, tokenizer: Any) -> None:
    base = make_model(len(tokenizer))
    module = CausalLMModule(copy.deepcopy(base), lr=1e-2, lora=LORA, adapters_only=True)
    trainer = Trainer(max_steps=2, **QUIET)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved and all("lora" in name for name in saved)
    loaded = CausalLMModule.load_from_checkpoint(tmp_path / "a.ckpt", model=base, lora=LORA, weights_only=True)
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    other = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(HAMUStateError, match="4 of them the same"):
        CausalLMModule.load_from_checkpoint(
            tmp_path / "a.ckpt", model=make_model(len(tokenizer)), lora=other, weights_only=True
        )


def test_what_is_refused(tokenizer: Any) -> None:
    model = make_model(len(tokenizer))
    with pytest.raises(HAMUValueError, match="Nothing is downloaded"):
        CausalLMModule("someone/some-model")
    with pytest.raises(HAMUValueError, match="causal language model"):
        CausalLMModule(nn.Linear(2, 2))
    with pytest.raises(HAMUValueError, match="`adapters_only`, but it has none"):
        CausalLMModule(model, adapters_only=True)
    with pytest.raises(HAMUValueError, match="configuration of PEFT"):
        CausalLMModule(model, lora={"r": 2})
    with pytest.raises(HAMUValueError, match="all are frozen"):
        CausalLMModule(copy.deepcopy(model).requires_grad_(False))
    with pytest.raises(HAMUValueError, match="without adapters"):
        CausalLMModule(get_peft_model(model, LORA), lora=LORA)
