"""The tutorials run from their first line to the last: the digits as they are, the others with less of everything."""

from __future__ import annotations

from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parent.parent / "docs" / "tutorials"

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:UserWarning")
    for message in (
        "The .* does not have many workers",
        "The number of training batches .* is smaller than the logging interval",
        "The fit has ended before the target",
        "The forget loss is",
        "The base optimizer SGD has momentum",
        "You passed in a `val_dataloader` but have no `validation_step`",
    )
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(name: str, **less: str) -> None:
    """Run a tutorial, in which each text on the left stands and is replaced by that on the right."""
    text = (TUTORIALS / name).read_text()
    for more, fewer in less.items():
        assert more in text
        text = text.replace(more, fewer)
    exec(compile(text, name, "exec"), {"__name__": "__main__"})


def test_the_digits(capsys: pytest.CaptureFixture[str]) -> None:
    run("digits.py")
    said = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if " FA " in line}
    assert float(said["original"][4]) > 0.9
    assert float(said["unlearned"][4]) < 0.1
    assert float(said["unlearned"][2]) > 0.95


def test_a_deletion_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    less = {"max_epochs=40": "max_epochs=1", "max_steps=100": "max_steps=2", "range(3)]": "range(2)]"}
    run("deletion_request.py", **less, **{"control=retrained": "control=retrained, steps=2"})
    assert "written: out" in capsys.readouterr().out
    assert "c-3" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "unlearned.ckpt").exists()


def test_comparing(capsys: pytest.CaptureFixture[str]) -> None:
    less = {'"max_epochs": 15': '"max_epochs": 1', '"max_steps": 30': '"max_steps": 2', "seeds=(0, 1)": "seeds=(0,)"}
    run("comparing.py", **less, **{"pool=3": "pool=2", "trials=3": "trials=1"})
    said = capsys.readouterr().out
    assert "another retrained" in said and "HAMU, Unseen" in said and "SSD" in said
