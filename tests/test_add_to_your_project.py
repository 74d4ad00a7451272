"""The code of docs/add_to_your_project.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from hamu_lightning.commands import main
from tests.unlearn_data.test_unlearn_data import Net, Project

PAGE = (Path(__file__).parents[1] / "docs" / "add_to_your_project.md").read_text()
(DIFF,) = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
(CONFIG,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^    hamu-lightning (.*)$", PAGE, re.MULTILINE)
PLACE = "tests.unlearn_data.test_unlearn_data"
pytestmark = [
    pytest.mark.filterwarnings("ignore:The fit has ended before the target:UserWarning"),
    pytest.mark.filterwarnings("ignore:The progress to the answer .* there is nothing to forget"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:No seed found"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    (tmp_path / "forget_ids.csv").write_text("client\nc3\nc17\n")
    trainer = Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(Net(), datamodule=Project())
    trainer.save_checkpoint("best.ckpt")
    return tmp_path


def shortened(code: str) -> str:
    return (
        code.replace("customer_id", "client").replace("max_steps=100", "max_steps=2").replace("steps: 100", "steps: 2")
    )


def test_the_lines_that_a_project_adds(folder: Path) -> None:
    kept = [line[1:] for line in DIFF.splitlines() if not line.startswith("-")]
    added, removed = (sum(line.startswith(sign) for line in DIFF.splitlines()) for sign in "+-")
    assert added - removed <= 6
    names: dict[str, Any] = {"MyDataModule": Project, "MyModule": Net}
    exec(shortened("\n".join(kept)), names)
    assert names["hamu"].forget_passes > 0
    assert {*torch.load("unlearned.ckpt", weights_only=True)["state_dict"]} == {"net.weight", "net.bias"}
    assert "c17" in (folder / "out" / "report.html").read_text()


def test_the_commands(folder: Path) -> None:
    config = (
        shortened(CONFIG).replace("my_project.MyModule", f"{PLACE}.Net").replace(", init_args: {batch_size: 64}", "")
    )
    (folder / "config.yaml").write_text(config.replace("my_project.MyDataModule", f"{PLACE}.Project"))
    codes = [main([*shortened(command).split(), "--trainer.accelerator=cpu"]) for command in COMMANDS]
    assert [command.split()[0] for command in COMMANDS] == ["preflight", "unlearn", "evaluate"]
    assert codes[0] == codes[2] == 0 and codes[1] in (0, 1)
    assert (folder / "out" / "report.html").exists()
