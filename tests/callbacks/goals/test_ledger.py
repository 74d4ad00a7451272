"""The ledger: a file that survives a kill, a resume, and other runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from hamu_lightning import HAMUQ, HAMUCallback, VerifySteps
from hamu_lightning.callbacks.goals._ledger import Ledger
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.rules import FixedRadius, RelativeQuota
from tests.callbacks.modules import Base, build, fit, make_data


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "try": 1, "region": 1.0, **more, "verdict": "accept"}


def steps(path: Path) -> list[str]:
    return [line["step"] for line in csv.DictReader(path.read_text().splitlines())]


@pytest.mark.parametrize("left_over", ["", "7,1", "7,1,1.0,accept\r\n8,1"])
def test_a_resumed_run_writes_no_step_twice(left_over: str, tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    first = Ledger(path)
    for step in range(5):
        first.write(row(step))
    state = first.state_dict()
    for step in (5, 6):
        first.write(row(step))
    with path.open("a", newline="") as file:
        file.write(left_over)
    second = Ledger(path)
    second.load_state_dict(state, step=5)
    for step in (5, 6, 7):
        second.write(row(step))
    assert steps(path) == [*"01234567"]


def test_lines_of_others_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    first = Ledger(path)
    first.write(row(3))
    state = first.state_dict()
    Ledger(path).write(row(0))
    second = Ledger(path)
    second.load_state_dict(state, step=4)
    second.write(row(4))
    assert steps(path) == [*"304"]


@pytest.mark.parametrize("text", ["", "step,tr", "step,try,region,verdict\r\n1,1,1.0,accept\r\n2,1"])
def test_what_a_kill_has_left_of_a_line_is_cut_off(text: str, tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    path.write_bytes(text.encode())
    Ledger(path).write(row(9))
    assert steps(path) == ([*"19"] if "\n" in text else ["9"])


def test_the_file_of_a_group_that_came_later_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    first = Ledger(path)
    first.write(row(0))
    first.write(row(1, alice_loss=2.0))
    state = first.state_dict()
    first.write(row(2, alice_loss=2.0))
    second = Ledger(path)
    second.load_state_dict(state, step=2)
    second.write(row(2, alice_loss=3.0))
    assert steps(path) == ["0"] and steps(tmp_path / "steps-2.csv") == ["1", "2"]


def test_a_path_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "ledger.csv"):
        hamu = HAMUCallback(
            DataLoader(make_data(40), batch_size=20),
            HAMUQ(RelativeQuota(0.3), radius=FixedRadius(0.01)),
            verify=VerifySteps(ledger=path),
        )
        with pytest.raises(Exception, match="Expected `ledger` to be a file that can be written, but got"):
            fit(build(Base), hamu)
        assert hamu.forget_passes == 0


def test_a_full_disk_leaves_the_weights_of_the_last_judged_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [], csv.DictWriter.writerow
    module = build(Base)

    def full(self: Any, row: Any) -> Any:
        if len(written) == 4:  # the line of the fourth try, after that of the columns
            raise OSError(28, "No space left on device")
        written.append([p.detach().clone() for p in module.parameters()])
        return write(self, row)

    monkeypatch.setattr(csv.DictWriter, "writerow", full)
    verify = VerifySteps(ledger=tmp_path / "steps.csv")
    callback = HAMUCallback(make_data(40, seed=9), HAMUQ(0.01, radius=FixedRadius(0.01)), verify=verify)
    with pytest.raises(HAMUStateError, match=r"(?s)steps.csv.*No space left on device.*ledger=False"):
        fit(module, callback)
    assert all(torch.equal(a, b) for a, b in zip(written[-1], module.parameters(), strict=True))
    assert steps(tmp_path / "steps.csv") == [*"012"]
