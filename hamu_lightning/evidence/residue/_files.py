"""What the files of a folder may still hold."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from hamu_lightning.evidence import Finding
from hamu_lightning.evidence.residue._checkpoints import SUFFIXES, judge_checkpoints, load_checkpoint
from hamu_lightning.files import UNFINISHED

CACHE = "cached_logits.json"
_EVENTS = "events.out.tfevents"
_OPAQUE = (".pkl", ".pickle", ".joblib", ".npy", ".npz", ".safetensors", ".onnx", ".distcp", ".parquet", ".h5", ".hdf5")
_MEDIA = {"images": "images", "audio": "audio", "text": "text", "mesh": "meshes"}
# What a table of ours, or of others, calls the column of sample ids.
_ID_COLUMNS = {"position", "id", "ids", "index", "sample", "sample_id"}


def judge_folder(folder: Path) -> Iterator[Finding]:
    """Look at all files below a folder; what links elsewhere is looked at as if it lay here."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    caches = {path.parent for path in files if path.name == CACHE}
    mine = [path for path in files if path.parent not in caches]
    yield from judge_checkpoints([load_checkpoint(p) for p in mine if p.suffix in SUFFIXES], folder)
    for cache in sorted(caches):
        advice = "Delete it, CachedLogits(folder).delete(), or with `hamu-lightning scrub FOLDER --apply`."
        yield Finding(f"{_name(cache, folder)}: cached logits of the model that remembers", "yes", advice)
    for path in mine:
        found = _judge_file(path, _name(path, folder))
        if found is not None:
            yield found


def _judge_file(path: Path, name: str) -> Finding | None:
    if path.name.endswith(UNFINISHED):
        advice = "It is what an interrupted writer left. `hamu-lightning scrub FOLDER --apply` deletes it."
        return Finding(name, "unknown", advice)
    if _EVENTS in path.name:
        return _judge_events(path, name)
    match path.suffix:
        case ".yaml" | ".yml":
            return _judge_yaml(path, name)
        case ".csv":
            return _judge_table(path, name)
        case ".json":
            return _judge_json(path, name)
        case suffix if suffix in _OPAQUE:
            return Finding(
                name, "unknown", "Its content is not looked at: it may be weights or data. Check, or delete it."
            )
    return None


def _judge_yaml(path: Path, name: str) -> Finding:
    if "!!python/" in path.read_text(encoding="utf-8", errors="replace"):
        return Finding(name, "unknown", "Python objects are written out in it, which may be data. Look, or delete it.")
    return Finding(name, "no", "Plain settings.")


def _judge_table(path: Path, name: str) -> Finding:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        columns = {column.strip().lower() for column in next(csv.reader(file), [])}
    if columns & _ID_COLUMNS:
        return Finding(name, "yes", "It lists single samples. Keep it only if the deletion has to be shown.")
    return Finding(name, "no", "Columns of numbers, none of them of sample ids.")


def _judge_json(path: Path, name: str) -> Finding | None:
    with path.open(encoding="utf-8", errors="replace") as file:
        is_run = file.read(1 << 20).find('"log_odds"') >= 0
    advice = "A run of `compare`: it holds what a model says of each forgotten sample. Delete it when it is done with."
    return Finding(name, "yes", advice) if is_run else None


def _judge_events(path: Path, name: str) -> Finding:
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    except ImportError:
        return Finding(name, "unknown", "Install tensorboard to look into it: pip install tensorboard")
    found: dict[str, None] = {}
    try:
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                kind = _MEDIA.get(value.metadata.plugin_data.plugin_name)
                found.update({} if kind is None else {kind: None})
    except Exception:  # what a broken file raises depends on where it is broken
        return Finding(name, "unknown", "It cannot be read. Delete it, or look at it with TensorBoard.")
    if not found:
        return Finding(name, "no", "Numbers and figures' names alone.")
    advice = f"It holds {', '.join(found)}. See in TensorBoard whether forgotten samples are among them."
    return Finding(name, "unknown", advice)


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
