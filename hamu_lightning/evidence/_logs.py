"""The report from files alone: the record, the ledger of verified steps, and TensorBoard's event files in a folder."""

from __future__ import annotations

import csv
import math
from importlib import import_module
from pathlib import Path
from typing import Any

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.evidence._page import Drawable, render_page
from hamu_lightning.evidence._record import RECORD, make_record, read_record
from hamu_lightning.report import plot_promises, plot_tradeoff

_LEVELS = (("hamu/retain_level", "hamu/forget_level"), ("retain/loss", "forget/loss"))


def report_folder(folder: str | Path) -> str:
    """Return the page that can be made from the files of a folder and of the folders in it.

    With a record (the newest, where there are several) the page is that of its run; without one it says what the log
    shows, and that nobody can tell the rest. The ledger (`hamu_ledger*.csv`) and event files give the pictures.

    Args:
        folder: Such as `lightning_logs/version_0`.

    Raises:
        HAMUValueError: If it is no folder.
        HAMUStateError: If nothing of hamu_lightning is in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HAMUValueError(f"Expected a folder with logs, but {str(folder)!r} is none. Give that of one run.")
    records = sorted(folder.rglob(RECORD), key=lambda path: path.stat().st_mtime)
    ledger, scalars = _read_ledgers(folder), _read_events(folder)
    found = {name: values for name, values in scalars.items() if name.startswith(("hamu/", "forget/"))}
    if not (records or ledger or found):
        raise HAMUStateError(
            f"Expected a record, a ledger or event files of an unlearning run in {str(folder)!r}, but found none. "
            "Give the folder of the Trainer's logger, or write a record: evidence.report(callback, folder)."
        )
    record = read_record(records[-1]) if records else make_record(requests={}, run=_run(ledger, found))
    return render_page(record, _draw(scalars, ledger))


def draw_logs(folder: str | Path) -> dict[str, Drawable]:
    """Return the pictures that the ledger and the event files of a folder give, by title."""
    return _draw(_read_events(Path(folder)), _read_ledgers(Path(folder)))


def _draw(scalars: dict[str, list[tuple[int, float]]], ledger: list[dict[str, Any]]) -> dict[str, Drawable]:
    return {**_draw_path(scalars), **_draw_promises(ledger)}


def _read_ledgers(folder: Path) -> list[dict[str, Any]]:
    """The lines of all ledgers, those that are whole."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.rglob("hamu_ledger*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows += [{**row} for row in csv.DictReader(file) if row.get("verdict") in ("accept", "retry", "drop")]
    return rows


def _read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """For each scalar its steps and values; nothing where TensorBoard is not installed."""
    if not any(folder.rglob("events.out.tfevents.*")):
        return {}
    try:
        module = import_module("tensorboard.backend.event_processing.event_accumulator")
    except ImportError as error:
        raise HAMUStateError(
            "Expected tensorboard for the event files of the folder, but it is not installed. Run: pip install "
            "hamu_lightning[report]"
        ) from error
    found: dict[str, list[tuple[int, float]]] = {}
    for parent in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = module.EventAccumulator(str(parent), size_guidance={module.SCALARS: 0}).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
    return found


def _run(ledger: list[dict[str, Any]], scalars: dict[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """What the log says of a run without a record: counts, and the last values."""
    verdicts = [row["verdict"] for row in ledger]
    counts = {f"verified_steps_{name}": verdicts.count(verdict) for name, verdict in _VERDICTS} if ledger else {}
    return counts | {f"last_{name}": values[-1][1] for name, values in sorted(scalars.items()) if values}


_VERDICTS = (("kept", "accept"), ("tried_again", "retry"), ("left_out", "drop"))


def _draw_path(scalars: dict[str, list[tuple[int, float]]]) -> dict[str, Drawable]:
    """The path in the plane of the two losses: of levels in evaluation mode, else of training batches."""
    for retain, forget in _LEVELS:
        first, second = dict(scalars.get(retain, ())), dict(scalars.get(forget, ()))
        steps = [step for step in sorted({*first} & {*second}) if math.isfinite(first[step] + second[step])]
        if len(steps) > 1:
            falls = [first[steps[0]] - first[step] for step in steps]
            rises = [second[step] - second[steps[0]] for step in steps]
            return {f"The way of {forget} against {retain}": plot_tradeoff(falls, rises, steps)}
    return {}


def _draw_promises(ledger: list[dict[str, Any]]) -> dict[str, Drawable]:
    """Promised against measured rise, for each request in the ledger."""
    figures: dict[str, Drawable] = {}
    columns = dict.fromkeys(name for row in ledger for name in row if name and name.startswith("due_"))
    for group in (name.removeprefix("due_") for name in columns):
        rows = [row for row in ledger if row.get(f"promised_{group}") and row.get(f"measured_{group}")]
        due, came, steps = (
            [float(row[name]) for row in rows] for name in (f"promised_{group}", f"measured_{group}", "step")
        )
        kept = [float(row["verdict"] == "accept") for row in rows]
        if rows:
            title = f"What each verified step promised for {group!r}, and what was measured"
            figures[title] = plot_promises(due, came, steps, kept)
    return figures
