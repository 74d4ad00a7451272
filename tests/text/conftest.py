"""What the tests of language models share; all of it is made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from hamu_lightning.text import CausalLMModule, QAData
from tests.text.world import make_model, make_rows, make_tokenizer, write_lines


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("facts") / "facts.jsonl", make_rows())


@pytest.fixture(scope="session")
def data(facts: Path, tokenizer: Any) -> QAData:
    return QAData(facts, tokenizer, forget="forgotten", holdout="unseen", batch_size=2)


@pytest.fixture(params=["full", "lora"])
def module(request: pytest.FixtureRequest, tokenizer: Any) -> CausalLMModule:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return CausalLMModule(make_model(len(tokenizer)), lr=1e-2, lora=lora if request.param == "lora" else None)
