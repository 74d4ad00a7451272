"""The code in docs/language_models.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.text.world import make_model, make_rows, write_lines

PAGE = (Path(__file__).parents[2] / "docs" / "language_models.md").read_text()
FIT, EVALUATION, CHECK, TRAINER, ACCELERATE, LARGE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:The forget loss is:UserWarning")  # the model knows nothing
@pytest.mark.filterwarnings("ignore:The fit has ended before the target:UserWarning")
def test_the_code_runs(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_lines(tmp_path / "facts.jsonl", make_rows())
    names: dict[str, Any] = {"model_folder": str(tmp_path / "model"), "retrained": model}
    with torch.random.fork_rng():
        fit = FIT.replace("max_steps=100", "max_steps=2, accelerator='cpu', devices=1")
        exec(fit.replace("samples=8, k=8", "samples=2, k=2, max_new_tokens=4"), names)
        exec(EVALUATION, names)
        exec(CHECK, names)
        exec(TRAINER.replace("max_steps=100", "max_steps=2, use_cpu=True, disable_tqdm=True"), names)
        exec(ACCELERATE.replace("Accelerator(", "Accelerator(cpu=True, "), names)
        assert names["optimizer"].steps > 0
        exec(LARGE.replace("max_steps=100", "max_steps=2, accelerator='cpu', enable_model_summary=False"), names)
        names["trainer"].fit(names["module"], datamodule=names["data"])
        assert names["hamu"].combined_steps > 0
    assert "forget/spans" in capsys.readouterr().out
    every = {name.partition("/")[2] or name for name in names["watch"].numbers}
    assert {name for name in every if f"{name}`" not in PAGE} == set()
