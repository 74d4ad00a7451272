"""The evaluation files of open-unlearning (arXiv 2506.12618): numbers to put side by side, and its retrained models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.text._scores import FORGET, RETAIN, TextEvaluation, TextRow

# Its names of the parts, and of what is asked of each: our number, and what its rows hold.
_PARTS = {FORGET: "forget", RETAIN: "retain", "real_authors": "ra", "world_facts": "wf"}
_Row = Callable[[TextRow], "dict[str, float] | None"]


def write_open_unlearning(
    evaluation: TextEvaluation, folder: str | Path, reference: TextEvaluation | None = None, *, name: str = "TOFU"
) -> Path:
    """Write an evaluation as open-unlearning does: `<name>_EVAL.json` and `<name>_SUMMARY.json`.

    Its plots and tables read the second one. The first one of a retrained model can be its `retain_logs_path`. Texts
    are left out: they may hold what is to be forgotten. The same by definition are probabilities, truth ratios (its
    geometric ones), ROUGE-L recall, `privleak` and `forget_quality`; `exact_memorization` and `extraction_strength`
    count the end-of-text token here, and there do not.

    Args:
        evaluation: What `evaluate_text` returned.
        folder: Where to; it is made where it does not exist, and files of these names are written anew.
        reference: The same parts under a retrained model, for forget quality and PrivLeak.
        name: What the files begin with.

    Returns:
        The path of the first file.

    Example:
        >>> import tempfile
        >>> from hamu_lightning.text import TextEvaluation, TextRow, TextScores
        >>> evaluation = TextEvaluation({"forget": TextScores([TextRow(7, 0.5, 1.0, 1.0, -0.7)])})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(read_open_unlearning(write_open_unlearning(evaluation, folder))["forget/exact_memorization"])
        1.0
    """
    numbers = evaluation.numbers(reference)
    found: dict[str, dict[str, Any]] = {}
    for ours, theirs, row in _names(evaluation.parts):
        if not math.isnan(numbers[ours].value):
            found[theirs] = {"agg_value": numbers[ours].value}
            if row is not None:
                rows = ((r.id, row(r)) for r in evaluation.parts[ours.split("/")[0]].rows)
                found[theirs]["value_by_index"] = {str(i): value for i, value in rows if value is not None}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    summary = {theirs: entry["agg_value"] for theirs, entry in found.items()}
    for kind, content in (("EVAL", found), ("SUMMARY", summary)):
        text = json.dumps(content, indent=4, sort_keys=True, allow_nan=False)
        (folder / f"{name}_{kind}.json").write_text(text, encoding="utf-8")
    return folder / f"{name}_EVAL.json"


def read_open_unlearning(path: str | Path) -> dict[str, float]:
    """Read an evaluation of open-unlearning, `..._EVAL.json` or `..._SUMMARY.json`, under our names.

    Args:
        path: The file.

    Returns:
        The numbers that have a name here (`TextEvaluation.numbers`), and all others under their own.

    Raises:
        HAMUValueError: If it is no such file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _refuse(path, f"{type(error).__name__}") from error
    if not isinstance(content, dict):
        raise _refuse(path, f"a JSON {type(content).__name__}")
    ours_of = {theirs: ours for ours, theirs, _ in _names(_PARTS)}
    found: dict[str, float] = {}
    for theirs, entry in content.items():
        value = entry.get("agg_value") if isinstance(entry, dict) else entry
        if value is not None:  # it writes null where a reference was missing
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise _refuse(path, f"no number for {theirs!r}")
            found[ours_of.get(theirs) or theirs] = float(value)
    return found


def _names(parts: Mapping[str, Any]) -> Iterator[tuple[str, str, _Row | None]]:
    """Yield our name, its name, and what its rows hold, of each number."""
    for part, short in _PARTS.items():
        if part in parts:
            yield f"{part}/probability", f"{short}_Q_A_Prob", _likelihood
            yield f"{part}/rouge_l_recall", f"{short}_Q_A_ROUGE", _rouge
            ratio = "forget_truth_ratio" if part == FORGET else f"{short}_Truth_Ratio"
            yield f"{part}/truth_ratio_geometric", ratio, _ratio
    if FORGET in parts:
        yield "forget/exact_memorization", "exact_memorization", lambda row: {"score": row.exact}
        yield "forget/extraction_strength", "extraction_strength", lambda row: {"score": row.extraction}
        yield "min_k_auc", "mia_min_k", None
        yield "priv_leak", "privleak", None
        yield "forget_quality_geometric", "forget_quality", None


def _likelihood(row: TextRow) -> dict[str, float]:
    return {"prob": math.exp(-row.loss), "avg_loss": row.loss}


def _rouge(row: TextRow) -> dict[str, float] | None:
    return None if row.rouge is None else {"rougeL_recall": row.rouge}


def _ratio(row: TextRow) -> dict[str, float] | None:
    return None if row.truth_ratio_geometric is None else {"score": row.truth_ratio_geometric}


def _refuse(path: str | Path, what: str) -> HAMUValueError:
    return HAMUValueError(
        f"Expected {Path(path).name!r} to be an evaluation of open-unlearning, a JSON object with a number for each "
        f"metric, but got {what}. Give its TOFU_EVAL.json or TOFU_SUMMARY.json."
    )
