"""The command line: its help, its answers, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hamu_lightning.commands import COMMANDS, main
from hamu_lightning.evidence import make_record, sign, write_report
from tests.evidence.test_signature import write_keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A record with the checkpoints of the two models."""
    torch.manual_seed(0)
    before, after = nn.Linear(3, 2), nn.Linear(3, 2)
    record = make_record(requests={"a": [1]}, weights_before=before, weights_after=after)
    write_report(tmp_path, record)
    torch.save(before.state_dict(), tmp_path / "before.pt")
    torch.save({"state_dict": after.state_dict(), "epoch": 3}, tmp_path / "after.ckpt")
    return tmp_path


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_fits_a_terminal(
    name: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        main([*([] if name is None else [name]), "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert f"Example: hamu-lightning {name}" in text if name else all(command in text for command in COMMANDS)


def test_the_model_of_the_record(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = str(folder / "hamu_record.json")
    assert main(["verify", record, "--checkpoint", str(folder / "after.ckpt")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "matches  weights: all 2 tensors are those after unlearning",
        "unknown  signature: the record is not signed",
    ]
    assert main(["verify", record, "--checkpoint", str(folder / "before.pt")]) == 1
    assert "DIFFERS  weights: all 2 tensors are those BEFORE unlearning" in capsys.readouterr().out


def test_each_tensor_that_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = torch.load(folder / "after.ckpt", weights_only=True)["state_dict"]
    weights["bias"][0] += 1
    weights["extra"] = weights.pop("weight")
    torch.save(weights, folder / "other.pt")
    assert main(["verify", str(folder / "hamu_record.json"), "--checkpoint", str(folder / "other.pt")]) == 1
    assert capsys.readouterr().out.splitlines()[:4] == [
        "DIFFERS  weights: 3 of 2 tensors are not those after unlearning",
        "DIFFERS    bias: other numbers",
        "DIFFERS    extra: only in the checkpoint",
        "DIFFERS    weight: only in the record",
    ]


def test_signatures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "hamu_record.json"
    private, public = write_keys(folder, "mine")
    _, other = write_keys(folder, "other")
    assert main(["verify", str(path)]) == 2
    assert "Nothing was checked" in capsys.readouterr().out
    assert main(["verify", str(path), "--public_key", str(public)]) == 1
    signed = sign(json.loads(path.read_text()), private)
    path.write_text(json.dumps(signed))
    assert main(["verify", str(path)]) == main(["verify", str(path), "--public_key", str(public)]) == 0
    assert main(["verify", str(path), "--public_key", str(other)]) == 1
    path.write_text(json.dumps({**signed, "limits": []}))
    assert main(["verify", str(path)]) == 1
    assert "DIFFERS  signature: it is not of this record" in capsys.readouterr().out


def test_errors_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = str(folder / "hamu_record.json")
    (folder / "broken.ckpt").write_bytes(b"no checkpoint")
    (folder / "empty").mkdir()
    for command, words in (
        (["verify", record, "--checkpoint", str(folder / "none.ckpt")], "there is no such file"),
        (["verify", record, "--checkpoint", str(folder / "broken.ckpt")], "to be a checkpoint, but it cannot be read"),
        (["verify", str(folder / "after.ckpt")], "to be a record of hamu_lightning"),
        (["report", str(folder / "none")], "Expected a folder with logs"),
        (["report", str(folder / "empty")], "Expected a record, a ledger or event files"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("hamu-lightning: Expected ") and words in error and error.count("\n") == 1


def test_a_page_from_the_record_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--out", str(folder / "pages" / "a.html")]) == 0
    assert capsys.readouterr().out == f"{folder / 'pages' / 'a.html'}\n"
    assert "Cannot be told" in (folder / "pages" / "a.html").read_text()
