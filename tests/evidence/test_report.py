"""The report of a fit, and the one from its files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from hamu_lightning import HAMUCallback
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.evidence import Evaluation, hash_id, read_record, report, report_folder
from tests.callbacks.modules import Base, build, fit, make_data
from tests.evidence.made_up import answer, make_logits, without_class
from tests.evidence.test_page import Page
from tests.evidence.test_record import EVIL, check


class Measured(NamedTuple):
    """As an EvaluateUnlearning after its fit."""

    before: Evaluation
    after: Evaluation


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[HAMUCallback, Path, Base]:
    """A fit with a target, its log folder, and its module."""
    folder = tmp_path_factory.mktemp("logs")
    data = make_data(40, seed=9)
    module = build(Base)
    callback = HAMUCallback(DataLoader(data, batch_size=20), target=5.0)
    logger = TensorBoardLogger(folder, name="", version="")
    with pytest.warns(UserWarning, match="before the target"):
        fit(module, callback, logger=logger, log_every_n_steps=1, max_epochs=3)
    return callback, folder, module


def test_what_the_callback_knows(run: tuple[HAMUCallback, Path, Base], tmp_path: Path) -> None:
    callback, logs, module = run
    places = callback.forgotten_samples["forget"].position.tolist()
    page = report(callback, tmp_path, weights_after=module, logs=logs, names={places[0]: EVIL})
    record = read_record(tmp_path / "hamu_record.json")
    check(record)
    salt = bytes.fromhex(record["salt"])
    assert record["requests"][0]["sample_hashes"] == sorted(hash_id(place, salt) for place in places)
    assert record["run"]["combined_steps"] == callback.combined_steps > 0
    assert record["run"]["summary"] == callback.summary
    assert "TargetQuota" in record["configuration"]["rule"]
    assert record["weights"]["after"] is not None and record["verdict"]["kind"] == "cannot_tell"
    parsed = Page(page.read_text())
    assert [tag for tag, _ in parsed.tags].count("img") == 2
    assert "What each verified step promised" in parsed.text
    measured = Measured(answer(make_logits(0)), answer(without_class(7)))
    report(callback, tmp_path, evaluation=measured)
    again = read_record(tmp_path / "hamu_record.json")
    assert again["metrics"]["after"]["FA"]["value"] == 0 and again["metrics"]["before"]["FA"]["value"] == 1


def test_from_files_alone(run: tuple[HAMUCallback, Path, Base]) -> None:
    _, logs, _ = run
    parsed = Page(report_folder(logs))
    assert [tag for tag, _ in parsed.tags].count("img") == 2
    assert "Nobody has measured" in parsed.text and "verified steps kept" in parsed.text
    assert "last hamu/forget" in parsed.text


def test_only_of_our_callback(tmp_path: Path) -> None:
    with pytest.raises(HAMUValueError, match="Expected `callback` to be the HAMUCallback of a fit"):
        report(torch.nn.Identity(), tmp_path)  # type: ignore[arg-type]
