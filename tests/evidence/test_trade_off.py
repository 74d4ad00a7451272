"""The score of a trade-off, and the table of samples, on numbers that are known."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hamu_lightning.errors import HAMUStateError
from hamu_lightning.evidence import Evaluation, MissingPyArrowError, PartScores, SampleTable, trade_off
from tests.evidence.test_scores import make_evaluation


def make(losses: list[float], right: list[float] | None = None, start: int = 0) -> PartScores:
    recognised = torch.full((len(losses),), math.nan) if right is None else torch.tensor(right)
    ids = torch.arange(start, start + len(losses))
    return PartScores(torch.tensor(losses, dtype=torch.float64), recognised.double(), ids)


FORGET, HELD_OUT = make([0.1, 0.2, 0.3], [1, 1, 1]), make([0.15, 0.25, 2.0, 3.0], [1, 1, 0, 0])


def test_without_references_it_is_what_was_kept_times_what_is_not_told_apart() -> None:
    before = Evaluation({"retain": make([0.1, 0.1], [1, 1]), "forget": FORGET, "holdout": HELD_OUT})
    now = Evaluation({"retain": make([0.1, 0.1], [1, 0]), "forget": FORGET, "holdout": HELD_OUT})
    auc = (4 + 3 + 2) / 12
    assert trade_off(now, before).score.value == pytest.approx(0.5 * (1 - (2 * auc - 1)))
    # Forgotten samples that are less sure than held-out ones are told from them just as well.
    over = Evaluation({"retain": make([0.1, 0.1], [1, 1]), "forget": make([9, 9, 9], [0, 0, 0]), "holdout": HELD_OUT})
    assert trade_off(over, before).score.value == 0
    # What gets better than before is not paid for.
    assert trade_off(before, now).score.value == pytest.approx(1 - (2 * auc - 1))


def test_a_class_that_goes_has_to_be_unknown() -> None:
    now = make_evaluation(forget=(4,))
    forget = now.parts["forget"]
    assert forget.labels is not None and now.gone.tolist() == [4]
    auc, recognised = now.numbers()["auc"].value, float(forget.recognised.mean())
    assert recognised > 0
    assert trade_off(now, now).score.value == pytest.approx((1 - abs(2 * auc - 1)) * (1 - recognised))
    alone = Evaluation({name: now.parts[name] for name in ("retain", "forget")})
    assert trade_off(alone, alone).score.value == pytest.approx(1 - recognised)


def test_with_references_it_is_one_minus_each_gap() -> None:
    now, first, second = make_evaluation(0), make_evaluation(9), make_evaluation(20)
    ours, theirs = now.numbers(), [first.numbers(), second.numbers()]
    expected = math.prod(
        1 - abs(ours[name].value - sum(each[name].value for each in theirs) / 2) for name in ("FA", "RA", "TA", "auc")
    )
    found = trade_off(now, first, [first, second])
    assert found.score.value == pytest.approx(expected) and not found.left_out
    assert trade_off(first, now, [first]).score.value == 1


def test_a_loss_stands_for_an_accuracy_that_is_not_known() -> None:
    parts = {"forget": make([1.0, 2.0]), "holdout": make([1.0, 2.0])}
    before, now = (Evaluation({**parts, "retain": make([loss, loss])}) for loss in (0.1, 0.4))
    assert trade_off(now, before).score.value == pytest.approx(0.25)
    assert trade_off(before, now).score.value == 1


def test_a_side_that_cannot_be_told_gives_no_score() -> None:
    alone = Evaluation({"retain": make([0.1], [1]), "forget": FORGET})
    found = trade_off(alone, alone)
    assert math.isnan(found.score.value) and "no held-out data" in str(found.score.reason)
    assert list(found.left_out) == ["auc"]
    found = trade_off(Evaluation({"forget": FORGET, "holdout": HELD_OUT}), alone)
    assert "no retain data was given" in str(found.score.reason)
    below = Evaluation({"retain": make([-0.1, 0.4]), "forget": FORGET, "holdout": HELD_OUT})
    assert "below 0" in str(trade_off(below, below).score.reason)
    found = trade_off(alone, alone, [alone])  # the gap of FA is known, and that of RA
    assert found.score.value == 1 and set(found.left_out) == {"TA", "auc"}


def test_samples_are_found_by_their_ids() -> None:
    whole = Evaluation({"forget": make([0.1, 0.2, 0.3, 0.4]), "holdout": make([1.0])})
    some = Evaluation({"forget": whole.parts["forget"].select(torch.tensor([3, 1]))}, is_whole=False)
    found = whole.at(some)
    assert found is not None and found.parts["forget"].losses.tolist() == [0.4, 0.2] and set(found.parts) == {"forget"}
    assert some.at(whole) is None and whole.at(Evaluation({"forget": make([1.0], start=9)})) is None


def test_the_table_needs_the_same_samples() -> None:
    with pytest.raises(HAMUStateError, match="same samples before and after"):
        SampleTable.of(Evaluation({"forget": FORGET}), Evaluation({"forget": make([1.0], start=9)}))


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = SampleTable.of(Evaluation({"forget": FORGET}), Evaluation({"forget": FORGET}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPyArrowError, match="pip install pyarrow"):
        table.to_parquet(tmp_path / "samples.parquet")
    written: dict[str, Any] = {}
    arrow, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    arrow.table = lambda columns: columns  # type: ignore[attr-defined]
    parquet.write_table = lambda columns, path: written.update({path: columns})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    table.to_parquet(tmp_path / "samples.parquet")
    (columns,) = written.values()
    assert columns["part"] == ["forget"] * 3 and columns["loss_before"] == FORGET.losses.tolist()
    assert "label" not in columns
