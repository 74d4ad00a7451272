"""The record of an unlearning run: one JSON object with all that was measured."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import platform
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from hamu_lightning.callbacks import ForgottenSamples
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.evidence._rows import AttackRow, Finding
from hamu_lightning.evidence._scores import Evaluation
from hamu_lightning.evidence._verdict import judge
from hamu_lightning.evidence._weights import Weights, compare_weights, hash_weights, join_hashes
from hamu_lightning.files import write_whole
from hamu_lightning.metrics.functional import Estimate

FORMAT = "hamu_lightning record 1"
RECORD = "hamu_record.json"
_PACKAGES = ("hamu_lightning", "torch", "lightning", "pytorch-lightning", "torchmetrics")
_SHOWN = 10
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_LIMITS = (
    "No measurement shows that nothing is left: only what these metrics and attacks look for can be found.",
    "Intervals cover the choice of the samples, not the spread over trainings; the floor is what other models that "
    "were trained without the data have among themselves.",
    "Backups, copies, exports, and models that learned from this one are not looked at.",
    "The salted hashes let whoever knows a sample's id check whether it was among the forgotten ones. They do not hide "
    "ids that can be guessed, such as small numbers, from somebody who holds this record.",
)


def make_record(
    *,
    requests: Mapping[str, Iterable[Any]],
    before: Evaluation | None = None,
    after: Evaluation | None = None,
    references: Sequence[Evaluation] = (),
    attacks: Sequence[AttackRow] = (),
    audit: Sequence[Finding] = (),
    weights_before: Weights | None = None,
    weights_after: Weights | None = None,
    samples: Mapping[str, ForgottenSamples] | None = None,
    seeds: Mapping[str, int] | None = None,
    configuration: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    limits: Sequence[str] = (),
    n_ids: Mapping[str, int] | None = None,
    salt: bytes | None = None,
) -> dict[str, Any]:
    """Put together what was asked, done and measured, as an object for JSON that `load_schema` describes.

    Args:
        requests: For the name of each request the ids of its samples: anything whose `str` names a sample. They go in
            as HMAC-SHA-256 under a random salt, which is in the record as well: records cannot be linked by them, and
            whoever knows an id can check it. Ids that can be guessed are not hidden from a reader of the record.
        before: What the original says of the data.
        after: What the unlearned model says.
        references: What models say that were trained without the data.
        attacks: What attacks found.
        audit: Where forgotten data may still sit.
        weights_before: The original, a module or state dict: of each tensor the SHA-256 goes in.
        weights_after: The unlearned model. With both, the row "unchanged" joins the attacks.
        samples: For each request what became of each sample.
        seeds: By name.
        configuration: Settings by name; what is no number, text or None goes in as its `repr`.
        run: Counts, the reason to stop, the summary.
        limits: More that a reader must know, beside what always holds.
        n_ids: For the name of a request how many ids it named, such as customers, where samples share one.
        salt: For tests alone. Default: 32 random bytes.

    Returns:
        A dict of what JSON has. A number that is not finite is None, with its reason.

    Example:
        >>> record = make_record(requests={"request-17": [4, 7]})
        >>> record["requests"][0]["n"], record["verdict"]["kind"]
        (2, 'cannot_tell')
    """
    salt = secrets.token_bytes(32) if salt is None else salt
    if weights_before is not None and weights_after is not None:
        attacks = [*attacks, compare_weights(weights_before, weights_after)]
    return {
        "format": FORMAT,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "salt": salt.hex(),
        "requests": [_request(name, ids, salt, (n_ids or {}).get(name)) for name, ids in requests.items()],
        "weights": {"before": _hashes(weights_before), "after": _hashes(weights_after)},
        "versions": {"python": platform.python_version(), **_versions()},
        "seeds": dict(seeds or {}),
        "configuration": {name: _plain(value) for name, value in (configuration or {}).items()},
        "run": {name: _plain(value) for name, value in (run or {}).items()},
        "metrics": _metrics(before, after, references),
        "samples": {name: _extremes(table, salt) for name, table in (samples or {}).items()},
        "attacks": [_attack(row) for row in attacks],
        "audit": [{"place": f.place, "holds": f.holds, "advice": f.advice} for f in audit],
        "verdict": _verdict(before, after, references, attacks),
        "limits": [*_LIMITS, *limits],
        "signature": None,
    }


def hash_id(sample: Any, salt: bytes) -> str:
    """Return HMAC-SHA-256 of a sample's id under a salt, hexadecimal.

    Example:
        >>> hash_id(7, b"salt") == hash_id("7", b"salt")
        True
    """
    return hmac.new(salt, str(sample).encode(), hashlib.sha256).hexdigest()


def load_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of records."""
    text = files("hamu_lightning.evidence").joinpath("record.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, or leave the old file as it is."""
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        HAMUStateError: If it is no record, or of another format.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HAMUStateError(
            f"Expected {str(path)!r} to be a record of hamu_lightning, but it cannot be read: {type(error).__name__}. "
            f"Give the {RECORD} of a report."
        ) from error
    missing = {*load_schema()["required"]} - {*record} if isinstance(record, dict) else {"format"}
    if missing or record["format"] != FORMAT:
        raise HAMUStateError(
            f"Expected {str(path)!r} to be a record of the format {FORMAT!r}, but got another file. Give the {RECORD} "
            "of a report that this version wrote."
        )
    return dict(record)


def _request(name: str, ids: Iterable[Any], salt: bytes, n_ids: int | None) -> dict[str, Any]:
    hashes = sorted(hash_id(one, salt) for one in ids)
    return {"name": name, "n": len(hashes), "n_ids": n_ids, "sample_hashes": hashes}


def _hashes(weights: Weights | None) -> dict[str, Any] | None:
    if weights is None:
        return None
    tensors = hash_weights(weights)
    return {"sha256": join_hashes(tensors), "tensors": tensors}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            # What is installed may be another version of us than what runs.
            found[name] = import_module(name).__version__ if name == "hamu_lightning" else version(name)
        except PackageNotFoundError:
            continue
    return found


def _metrics(before: Evaluation | None, after: Evaluation | None, references: Sequence[Evaluation]) -> dict[str, Any]:
    """The numbers by column and name. The floor is the first reference, measured by the others."""
    columns: dict[str, dict[str, Estimate]] = {}
    for name, model, pool in (("before", before, references), ("after", after, references), *_floor(references)):
        if model is not None:
            changed = {} if before is None or model is before else model.since(before)
            columns[name] = {**model.numbers(), **changed, **(model.distances(pool) if pool else {})}
    whole = [model.is_whole for model in (before, after, *references) if model is not None]
    return {
        "is_whole": all(whole) if whole else None,
        "references": len(references),
        **{
            name: {key: to_json(x) for key, x in columns[name].items()} if name in columns else None
            for name in _COLUMNS
        },
    }


_COLUMNS = ("before", "after", "floor")


def _floor(references: Sequence[Evaluation]) -> list[tuple[str, Evaluation | None, Sequence[Evaluation]]]:
    return [("floor", references[0], references[1:])] if references else []


def to_json(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate for JSON.

    Example:
        >>> to_json(Estimate(math.inf, (0.5, math.inf), (3,)))["reason"]
        'it is infinite'
    """
    reason = "it is infinite" if math.isinf(estimate.value) else estimate.reason
    return {
        "value": _finite(estimate.value),
        "interval": None if estimate.interval is None else [_finite(x) for x in estimate.interval],
        "n": [*estimate.n],
        "ideal": None if estimate.ideal is None else _finite(estimate.ideal),
        "bound": estimate.bound,
        "reason": reason,
    }


def _extremes(table: ForgottenSamples, salt: bytes) -> dict[str, Any]:
    """The samples that are remembered best, and those with the highest loss; by their hashes."""
    rows = sorted(table.rows(), key=lambda row: float(row["loss_after"]))
    shown = [{"sample": hash_id(row.pop("position"), salt), **{k: _plain(x) for k, x in row.items()}} for row in rows]
    return {"n": len(shown), "remembered": shown[:_SHOWN], "over_forgotten": shown[: -_SHOWN - 1 : -1]}


def _attack(row: AttackRow) -> dict[str, Any]:
    control = None if row.control is None else to_json(row.control)
    return {"name": row.name, "value": to_json(row.value), "control": control, "note": row.note}


def _verdict(
    before: Evaluation | None,
    after: Evaluation | None,
    references: Sequence[Evaluation],
    attacks: Sequence[AttackRow],
) -> dict[str, Any]:
    if before is None or after is None:
        text = "Nobody has measured whether the data are forgotten. Evaluate the model before and after unlearning."
        return {"kind": "cannot_tell", "text": text, "reasons": []}
    verdict = judge(before, after, references, attacks)
    return {"kind": verdict.kind, "text": verdict.text, "reasons": [*verdict.reasons]}


def _plain(value: Any) -> Any:
    """What JSON has: numbers, text, None; NaN and infinity are None, anything else its `repr` without addresses."""
    if isinstance(value, float):
        return _finite(value)
    return value if value is None or isinstance(value, bool | int | str) else _ADDRESS.sub("", repr(value))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
