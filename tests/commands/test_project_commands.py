"""The commands that work with a project: unlearn, preflight, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hamu_lightning import Chance, Holdout, SecondChoice, Unseen
from hamu_lightning.callbacks import HAMUCallback
from hamu_lightning.commands import main
from hamu_lightning.commands._project import Project
from hamu_lightning.commands._unlearn import unlearn
from hamu_lightning.errors import HAMUValueError
from tests.unlearn_data.test_unlearn_data import Net

PLACE = "tests.unlearn_data.test_unlearn_data"
CONFIG = f"""
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
model: {{class_path: {PLACE}.Net}}
data: {{class_path: {PLACE}.Project}}
"""
IDS = ["--forget-ids", "ids.csv", "--by", "client"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The fit has ended before the target:UserWarning"),
    pytest.mark.filterwarnings("ignore:The forget loss is 1.425 before the first step"),
    pytest.mark.filterwarnings("ignore:No seed found"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back what `seed_everything` sets
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "ids.csv").write_text("client\nc3\nc17\n")
    torch.save(Net().state_dict(), "best.pt")
    return tmp_path


def test_from_weights_and_ids_to_weights_and_a_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "config.yaml", "--weights", "best.pt", *IDS]
    assert main(["unlearn", *words, "--hamu.target", "3.0", "--out", "u.ckpt", "--report", "out"]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == ["u.ckpt", "out/report.html"]
    content = torch.load("u.ckpt", weights_only=True)
    assert not {"optimizer_states", "callbacks"} & {*content}
    assert not torch.equal(content["state_dict"]["net.weight"], torch.load("best.pt")["net.weight"])
    assert main(["verify", "out/hamu_record.json", "--checkpoint", "u.ckpt"]) == 0
    assert "c17" in (folder / "out" / "report.html").read_text()
    capsys.readouterr()
    assert main(["evaluate", "--config", "config.yaml", "--weights", "u.ckpt", "--before", "best.pt", *IDS]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"RA", "FA", "auc", "retain_loss", "forget_change", "surer"} <= {*told}
    assert float(told["forget_change"].split()[0]) > 0


def test_the_exit_code_of_a_rule_and_of_a_target_that_is_reached() -> None:
    words = ["unlearn", "--config", "config.yaml", "--weights", "best.pt", *IDS]
    assert main([*words, "--hamu.rule", "hamu_lightning.HAMUQ", "--hamu.rule.quota", "1e-3"]) == 0
    assert main([*words, "--hamu.target", "1.45"]) == 0
    guard = ["--hamu.guard", "hamu_lightning.RetainGuard", "--hamu.guard.rise", "0", "--hamu.guard.factor", "1"]
    assert main([*words, "--hamu.target", "3.0", *guard, "--hamu.guard.every=1", "--hamu.guard.max_returns=1"]) == 1


@pytest.mark.parametrize("logger", ["false", "true", "lightning.pytorch.loggers.CSVLogger"])
def test_preflight_changes_and_writes_nothing(logger: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logger if "." not in logger else f"{{class_path: {logger}, init_args: {{save_dir: .}}}}"
    (folder / "config.yaml").write_text(CONFIG.replace("logger: false", f"log_every_n_steps: 1\n  logger: {logger}"))
    before = sorted(folder.iterdir())
    assert main(["preflight", "--config", "config.yaml", "--weights", "best.pt", *IDS, "--hamu.target=1.5"]) == 0
    assert "The target of 1.5 is about" in capsys.readouterr().out
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "none.pt", *IDS], "no such file"),
        (["--weights", "other.pt", *IDS], "to hold the weights of Net, but it has no net.weight; no net.bias; weight,"),
        (["--weights", "best.pt", "--forget-ids", "none.csv"], "to name a file of ids"),
        (["--weights", "best.pt", *IDS, "--hamu.target=-1"], "target"),
        (["--weights", "best.pt", *IDS, "--trainer.max_stepz=3"], "See hamu-lightning unlearn --help"),
        ([*IDS], "weights"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.ones(2), "net": torch.ones(1)}, "other.pt")
    assert main(["unlearn", "--config", "config.yaml", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("hamu-lightning: ") and message in said


@pytest.mark.parametrize("command", ["unlearn", "preflight", "evaluate"])
def test_ids_are_checked_before_anything_else(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = [command, "--config", "config.yaml", "--weights", "best.pt", "--by", "client"]
    (folder / "ids.csv").write_text("client\nc3\nc999\n")
    assert main([*words, "--trainer.enable_model_summary=true", "--forget-ids", "ids.csv"]) == 2
    told = capsys.readouterr()
    assert "1 is not: c999." in told.err and "`--missing warn`" in told.err
    assert told.out == "" and "Trainable params" not in caplog.text


def test_absent_ids_that_are_rightly_absent(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "ids.csv").write_text("client\nc3\nc999\n")
    words = ["evaluate", "--config", "config.yaml", "--weights", "best.pt", *IDS, "--missing", "warn"]
    with pytest.warns(UserWarning, match="1 is not: c999. The others"):
        assert main(words) == 0
    assert "forget_loss" in capsys.readouterr().out
    assert main([*words[:-1], "ignore"]) == 2


@pytest.mark.parametrize("text", ["UnlearnData", "hamu_lightning.UnlearnData", "{class_path: UnlearnData}"])
def test_unlearn_data_needs_a_datamodule(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.yaml").write_text(CONFIG.partition("data:")[0] + f"data: {text}\n")
    assert main(["unlearn", "--config", "config.yaml", "--weights", "best.pt"]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told.startswith("hamu-lightning: Expected `data` to be a DataModule, but got UnlearnData without one. Give")


TARGETS: dict[str, Any] = {
    "{class_path: hamu_lightning.Holdout}": Holdout(),
    "{class_path: hamu_lightning.Unseen}": Unseen(),
    "{class_path: hamu_lightning.Unseen, init_args: {transform_like: holdout}}": Unseen(transform_like="holdout"),
    "{class_path: hamu_lightning.SecondChoice}": SecondChoice(),
    "{class_path: hamu_lightning.Chance, init_args: {num_classes: 10}}": Chance(10),
    "0.5": 0.5,
}


@pytest.mark.parametrize("text", [None, *TARGETS])
def test_every_target_in_yaml(text: str | None, folder: Path) -> None:
    if text is not None:
        (folder / "config.yaml").write_text(f"{CONFIG}\nhamu:\n  target: {text}\n")
    project = Project(unlearn, ["--config", "config.yaml", "--weights", "best.pt"])
    rule: Any = project.find_callback().settings.rule
    assert rule.target_quotas["forget"].target == (Unseen() if text is None else TARGETS[text])


def test_a_callback_of_the_trainer_is_taken(folder: Path) -> None:
    callbacks = "callbacks: {class_path: hamu_lightning.HAMUCallback, init_args: {target: 0.3, seed: 5}}"
    (folder / "config.yaml").write_text(CONFIG.replace("max_epochs: 2", f"max_epochs: 2\n  {callbacks}"))
    words = ["--config", "config.yaml", "--weights", "best.pt"]
    project = Project(unlearn, words)
    assert project.find_callback().settings.seed == 5
    assert sum(isinstance(c, HAMUCallback) for c in project.trainer.callbacks) == 1  # type: ignore[attr-defined]
    with pytest.raises(HAMUValueError, match="one of the Trainer and one of --hamu"):
        Project(unlearn, [*words, "--hamu.target=0.5"]).find_callback()
