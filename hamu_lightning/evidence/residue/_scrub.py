"""Taking out of a folder what is ours and still remembers."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch

from hamu_lightning.evidence.residue._audit import open_folder
from hamu_lightning.evidence.residue._checkpoints import SUFFIXES, Checkpoint, load_checkpoint
from hamu_lightning.evidence.residue._files import CACHE, judge_folder
from hamu_lightning.evidence.residue._state import REFERENCE, STATE_KEY, strip
from hamu_lightning.files import UNFINISHED, write_whole
from hamu_lightning.objectives import CachedLogits


@dataclass(frozen=True)
class Scrubbed:
    """One thing that is ours, or that is not and remains.

    Attributes:
        path: The file or folder.
        action: "rewritten", "deleted"; with `dry_run` "would be rewritten", "would be deleted"; "remains".
        what: What it holds, or held, and what follows.
    """

    path: Path
    action: Literal["rewritten", "deleted", "would be rewritten", "would be deleted", "remains"]
    what: str


def scrub(folder: str | Path, *, dry_run: bool = True) -> list[Scrubbed]:
    """Take out of a folder what is ours and remembers; list what is not ours and remains.

    - Checkpoints: out of the state of the HAMUCallback go the weights of references and of earlier steps, and losses of
      single samples. All else is kept bit by bit. The file is written under another name first, and then given its own.
    - `CachedLogits`, and what interrupted writers of ours have left: deleted.

    A checkpoint loads afterwards as before. A fit goes on from it as from one that has ended: an objective that
    compares with a reference has to be given the original. Weights, moments, logs and pickles remain as they are; so do
    deleted files in the free space of a disk, and backups.

    Args:
        folder: The folder; all below it is looked at.
        dry_run: Say only what would be done.

    Returns:
        What was done, and what remains.

    Raises:
        HAMUValueError: If there is no such folder.
        HAMUStateError: If a file cannot be written; the old one is there then.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = CachedLogits(Path(folder, "cache")).fill(nn.Linear(2, 2), [])
        ...     [entry.action for entry in scrub(folder)]
        ['would be deleted']
    """
    path = open_folder(folder)
    done = [*_clean_checkpoints(path, dry_run), *_delete_caches(path, dry_run)]
    # After a dry run the findings still name what would be taken out.
    remains = [
        Scrubbed(path / finding.place.partition(": ")[0], "remains", f"{finding.place}: {finding.advice}")
        for finding in judge_folder(path)
        if finding.holds != "no" and "hamu-lightning scrub" not in finding.advice
    ]
    return [*done, *remains]


def _clean_checkpoints(folder: Path, dry_run: bool) -> Iterator[Scrubbed]:
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in SUFFIXES):
        checkpoint = load_checkpoint(path)
        if checkpoint.content is None or checkpoint.state is None:
            continue
        state, kinds = strip(checkpoint.state)
        if not kinds:
            continue
        if not dry_run:
            _rewrite(path.resolve(), _with_state(checkpoint, state))  # a link stays one
        after = "; to go on from it, give the objective the original as its reference" if REFERENCE in kinds else ""
        yield Scrubbed(path, "would be rewritten" if dry_run else "rewritten", ", ".join(kinds) + after)


def _with_state(checkpoint: Checkpoint, state: dict[str, Any]) -> dict[str, Any]:
    """What is in a checkpoint, with another state."""
    content = dict(checkpoint.content or {})
    return state if checkpoint.is_beside else {**content, "callbacks": {**content["callbacks"], STATE_KEY: state}}


def _rewrite(path: Path, content: dict[str, Any]) -> None:
    """Whoever may read it, and when it was written, stays: `audit` tells by the time what came before unlearning."""
    before = path.stat()

    def write(file: IO[bytes]) -> None:
        os.chmod(file.name, stat.S_IMODE(before.st_mode))
        torch.save(content, file)

    write_whole(path, write)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _delete_caches(folder: Path, dry_run: bool) -> Iterator[Scrubbed]:
    action: Literal["would be deleted", "deleted"] = "would be deleted" if dry_run else "deleted"
    for header in sorted(folder.rglob(CACHE)):
        if not dry_run:
            CachedLogits(header.parent).delete()
        yield Scrubbed(header.parent, action, "logits of the model that remembers")
    for path in sorted(folder.rglob(f"*{UNFINISHED}")):
        if not dry_run:
            path.unlink(missing_ok=True)
        yield Scrubbed(path, action, "what an interrupted writer left")
