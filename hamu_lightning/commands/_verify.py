"""`hamu-lightning verify`: whether a model is the one of a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hamu_lightning.commands._weights import read_weights
from hamu_lightning.evidence import check_signature, hash_weights, read_record

_SHOWN = 5


def verify(record: str, checkpoint: str | None = None, public_key: str | None = None) -> int:
    """Compare a model with a record, and check the record's signature.

    Nothing in the checkpoint is executed. The exit code is 0 where all matches, 1 where something differs, and 2 where
    a file cannot be read or there was nothing to check.

    Example: hamu-lightning verify hamu_record.json --checkpoint last.ckpt

    Args:
        record: The hamu_record.json of a report.
        checkpoint: File of a Lightning checkpoint or of a state dict.
        public_key: PEM file with the key that must have signed the record.
    """
    content = read_record(record)
    checks = [
        *([] if checkpoint is None else _check_weights(content["weights"], read_weights(checkpoint))),
        *_check_signature(content, public_key),
    ]
    for is_right, line in checks:
        print(f"{_MARKS[is_right]:8} {line}")
    answers = [is_right for is_right, _ in checks if is_right is not None]
    if not answers:
        print("Nothing was checked: give --checkpoint, or a record that is signed.")
        return 2
    return 0 if all(answers) else 1


_MARKS = {True: "matches", False: "DIFFERS", None: "unknown"}
Check = tuple[bool | None, str]


def _check_weights(recorded: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[Check]:
    """One line for the whole, and some for tensors that differ."""
    after, before = recorded["after"], recorded["before"]
    if after is None:
        return [(None, "weights: the record holds no hash of the unlearned model")]
    mine = hash_weights(weights)
    if mine == after["tensors"]:
        return [(True, f"weights: all {len(mine)} tensors are those after unlearning")]
    if before is not None and mine == before["tensors"]:
        return [(False, f"weights: all {len(mine)} tensors are those BEFORE unlearning")]
    theirs = after["tensors"]
    wrong = sorted(name for name in {*mine} | {*theirs} if mine.get(name) != theirs.get(name))
    lines: list[Check] = [(False, f"weights: {len(wrong)} of {len(theirs)} tensors are not those after unlearning")]
    lines += [(False, f"  {name}: {_explain(name in mine, name in theirs)}") for name in wrong[:_SHOWN]]
    return lines + ([(False, f"  and {len(wrong) - _SHOWN} more")] if len(wrong) > _SHOWN else [])


def _explain(is_mine: bool, is_theirs: bool) -> str:
    return "other numbers" if is_mine and is_theirs else "only in the checkpoint" if is_mine else "only in the record"


def _check_signature(record: Mapping[str, Any], public_key: str | None) -> list[Check]:
    signature = record["signature"]
    if signature is None:
        wanted = public_key is not None
        return [(False if wanted else None, "signature: the record is not signed")]
    if not check_signature(record, public_key):
        return [(False, "signature: it is not of this record" + (" and this key" if public_key else ""))]
    if public_key is not None:
        return [(True, "signature: by the given key")]
    return [
        (True, f"signature: by the key {signature['public_key']}"),
        (None, "  whose key that is: give --public_key to know"),
    ]
