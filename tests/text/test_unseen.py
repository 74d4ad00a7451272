"""What a model would say that never saw the texts, with the one below the adapters as its teacher."""

from __future__ import annotations

import re
from typing import Any

import pytest
from lightning.pytorch import Trainer
from peft import LoraConfig

from hamu_lightning import HAMUCallback
from hamu_lightning.callbacks import Unseen
from hamu_lightning.objectives import AdaptersDisabled
from hamu_lightning.text import CausalLMModule, QAData
from tests.text.test_module import QUIET
from tests.text.world import make_trained_model

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


def test_answers_of_a_teacher_below_the_adapters(data: QAData, tokenizer: Any) -> None:
    """Learnt by the adapters, and forgotten towards what the model below them says: a few steps of a fit."""
    module = CausalLMModule(make_trained_model(tokenizer, steps=5), lr=3e-2, lora=LORA)
    optimizer, batch = module.configure_optimizers(), next(iter(data.forget_dataloader()))
    for _ in range(10):
        optimizer.zero_grad()
        module(**batch).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    hamu = HAMUCallback(target=Unseen(data.val_dataloader(), teacher=AdaptersDisabled()), verify=False)
    with pytest.warns(UserWarning, match="before the target") as told:
        Trainer(max_steps=3, num_sanity_val_steps=0, callbacks=[hamu], **QUIET).fit(module, datamodule=data)
    (words,) = [str(one.message) for one in told if "before the target" in str(one.message)]
    way, end = map(float, re.findall(r"nats\) ([\d.]+) for a target of ([\d.]+);", words)[0])
    assert 0 < way < end and hamu.combined_steps == 3
