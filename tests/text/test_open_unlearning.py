"""The evaluation files of open-unlearning, against its formulas; copies of an evaluation."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.text import TextEvaluation, TextRow, TextScores, read_open_unlearning, write_open_unlearning


def make_evaluation(seed: int) -> TextEvaluation:
    draw = np.random.default_rng(seed)

    def row(i: int) -> TextRow:
        loss, exact, extraction, ratio = draw.random(4)
        given = {"truth_ratio": ratio, "truth_ratio_geometric": 2 * ratio, "share_of_options": 0.5, "rouge": exact}
        return TextRow(i, loss, exact, extraction, -loss, **given, question="Who?", answer="A secret.")

    return TextEvaluation(
        {part: TextScores([row(10 * i) for i in range(12)]) for part in ("forget", "retain", "holdout", "world_facts")}
    )


def test_what_is_written_follows_its_formulas(tmp_path: Path) -> None:
    ours, retrained = make_evaluation(0), make_evaluation(1)
    path = write_open_unlearning(ours, tmp_path / "new", retrained)
    reference = write_open_unlearning(retrained, tmp_path / "retrained")
    logs, retain_logs = json.loads(path.read_text()), json.loads(reference.read_text())

    rows = logs["forget_Q_A_Prob"]["value_by_index"]
    assert list(rows) == sorted(str(10 * i) for i in range(12))
    assert logs["forget_Q_A_Prob"]["agg_value"] == pytest.approx(
        np.mean([np.exp(-row["avg_loss"]) for row in rows.values()])
    )
    ratios, others = (
        np.array([row["score"] for row in log["forget_truth_ratio"]["value_by_index"].values()])
        for log in (logs, retain_logs)
    )
    assert logs["forget_truth_ratio"]["agg_value"] == pytest.approx(np.mean(np.minimum(ratios, 1 / (ratios + 1e-10))))
    p = ks_2samp(1 / (ratios + 1e-10), 1 / (others + 1e-10)).pvalue
    assert logs["forget_quality"]["agg_value"] == pytest.approx(p)
    area, of_retrained = (log["mia_min_k"]["agg_value"] for log in (logs, retain_logs))
    privleak = ((1 - area) - (1 - of_retrained)) / (1 - of_retrained) * 100
    assert logs["privleak"]["agg_value"] == pytest.approx(privleak)
    kept = np.array([row["score"] for row in logs["wf_Truth_Ratio"]["value_by_index"].values()])
    assert logs["wf_Truth_Ratio"]["agg_value"] == pytest.approx(np.mean(np.maximum(0, 1 - kept)))


def test_no_text_is_written(tmp_path: Path) -> None:
    path = write_open_unlearning(make_evaluation(0), tmp_path)
    assert "secret" not in path.read_text() and "Who" not in path.read_text()


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    rows = [
        replace(row, truth_ratio=None, truth_ratio_geometric=None) for row in make_evaluation(0).parts["forget"].rows
    ]
    path = write_open_unlearning(TextEvaluation({"forget": TextScores(rows)}), tmp_path, name="MUSE")
    summary = json.loads((tmp_path / "MUSE_SUMMARY.json").read_text())
    assert path.name == "MUSE_EVAL.json"
    assert {*summary} == {"forget_Q_A_Prob", "forget_Q_A_ROUGE", "exact_memorization", "extraction_strength"}


@pytest.mark.parametrize("kind", ["EVAL", "SUMMARY"])
def test_reading_gives_our_names(tmp_path: Path, kind: str) -> None:
    ours = make_evaluation(0)
    write_open_unlearning(ours, tmp_path, make_evaluation(1))
    file = tmp_path / f"TOFU_{kind}.json"
    content = json.loads(file.read_text())
    content["forget_Q_A_gibberish"] = {"agg_value": 0.25} if kind == "EVAL" else 0.25
    content["mia_zlib"] = {"agg_value": None} if kind == "EVAL" else None
    file.write_text(json.dumps(content))
    found = read_open_unlearning(file)
    numbers = ours.numbers(make_evaluation(1))
    assert found.pop("forget_Q_A_gibberish") == 0.25
    assert "forget_quality_geometric" in found and "world_facts/truth_ratio_geometric" in found
    assert all(numbers[name].value == pytest.approx(value) for name, value in found.items())


@pytest.mark.parametrize("text", ["[1]", "{", '{"forget_quality": "high"}', '{"forget_quality": {"agg_value": true}}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(
        HAMUValueError, match=r"Expected 'other\.json' to be an evaluation of open-unlearning.*TOFU_EVAL\.json"
    ):
        read_open_unlearning(file)


def test_an_evaluation_can_be_copied_and_kept() -> None:
    ours = make_evaluation(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.parts["forget"].rows == ours.parts["forget"].rows and other.k == ours.k
