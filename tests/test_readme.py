"""The code in README.md runs as it stands, with small data for the names that a user brings along."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

import hamu_lightning
from tests.readme_example import MyModule, make_data, read_code, run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CODE = read_code(README)
(OPTIMIZER,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:The fit has ended before the target:UserWarning"),
]


# The README's other ways to say what to forget replace the first one in the same block. Odd samples are of class 1.
@pytest.mark.parametrize(
    ("how", "indices"),
    [
        ("target=Unseen(val_dataset)", [0, 3, 5]),
        ("target=Unseen()", [*range(1, 16, 2)]),
        ("target=Holdout(val_dataset)", [0, 3, 5]),
        ("rule=HAMUQ(quota=1e-3)", [0, 3, 5]),
    ],
)
def test_callback(
    how: str, indices: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert how in README
    monkeypatch.chdir(tmp_path)
    assert CODE.count("target=Unseen(val_dataset)") == 1
    code = CODE.replace("target=Unseen(val_dataset)", how)
    names = run("from hamu_lightning import *\n" + code, indices, steps=3)
    assert names["callback"].summary in capsys.readouterr().out


def test_the_page_of_the_package_has_no_links_to_files() -> None:
    page = runpy.run_path(str(ROOT / "setup.py"))["describe"](README)
    assert re.findall(r"\]\((?!https?:)", page) == []
    assert "*(Picture: The top of the report: still inside.)*" in page
    assert "Choosing a target (`docs/choosing.md`)" in page


def test_the_version_is_one() -> None:
    version = hamu_lightning.__version__
    assert f"hamu_lightning-{version}-py3" in README
    assert f"## [{version}] - 20" in (ROOT / "CHANGELOG.md").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


def test_many_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/many_requests.md."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "many_requests.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {f"loader_{name}": DataLoader(make_data(8), batch_size=4) for name in "abc"}
    exec(code, names)
    trainer = Trainer(max_epochs=1, callbacks=[names["callback"]], logger=False, enable_progress_bar=False)
    trainer.fit(MyModule(), DataLoader(make_data(16), batch_size=4))
    assert names["callback"].combined_steps == 4


def test_optimizer() -> None:
    model = nn.Linear(3, 1)
    retain_loss, forget_loss = (model(torch.randn(4, 3)).square().mean() for _ in range(2))
    names = {"torch": torch, "model": model, "retain_loss": retain_loss, "forget_loss": forget_loss}
    exec(OPTIMIZER, names)
    assert "forget_improvement" in repr(names["report"])
