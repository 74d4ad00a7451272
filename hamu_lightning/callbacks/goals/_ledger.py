"""The ledger of verified steps: a CSV file that is written as they go."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hamu_lightning.callbacks._refusal import HAMUMisconfigurationError
from hamu_lightning.errors import HAMUStateError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Ledger:
    """Appends lines to a CSV file; a resumed run goes on with its file, from the line where it was saved.

    A line may lack some of the columns. One with other columns (of a group that was added) begins a new file,
    `name-2.csv`. What a run that was killed has left of a line is cut off.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: list[str] = []

    def check(self) -> None:
        """Make its directory, and the file.

        Raises:
            HAMUMisconfigurationError: If it cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.open("a").close()
        except OSError as error:
            raise HAMUMisconfigurationError(
                f"Expected `ledger` to be a file that can be written, but got {str(self._path)!r}: {error.strerror}. "
                "Give VerifySteps(ledger=...) the path of a new file, or ledger=False."
            ) from error

    def write(self, row: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            HAMUStateError: If the system refuses, as on a full disk.
        """
        try:
            self._append(row)
        except OSError as error:
            raise HAMUStateError(
                f"Expected to write the ledger of verified steps, {str(self._path)!r}, but could not: "
                f"{error.strerror}. The weights are those of the last judged step. Make room, give "
                "VerifySteps(ledger=...) another path, or ledger=False; a checkpoint goes on from where it was saved."
            ) from error

    def _append(self, row: dict[str, Any]) -> None:
        first, number = self._path, 1
        while not set(row) <= set(self._columns or self._find_columns(row)):
            self._columns, number = [], number + 1
            self._path = first.with_stem(f"{first.stem}-{number}")
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def state_dict(self) -> dict[str, Any]:
        """Return which file it is, and how long."""
        return {"name": self._path.name, "size": self._path.stat().st_size if self._path.exists() else 0}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on where `state_dict` was called: the lines of steps from this one on are dropped, they will come again.

        Lines that others have added since are left alone.
        """
        path = self._path.with_name(state["name"])
        if not path.exists() or path.stat().st_size <= state["size"]:
            return
        self._path = path
        with path.open("rb+") as file:
            columns = next(csv.reader([file.readline().decode()]), [])
            file.seek(state["size"])
            rows = csv.DictReader(file.read().decode(errors="replace").splitlines(), columns)
            if all(_step_of(row) >= step for row in rows):
                file.truncate(state["size"])

    def _find_columns(self, row: dict[str, Any]) -> list[str]:
        """The columns of the file; those of `row` where it is new."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab+") as file:
            file.seek(0)
            text = file.read()
            file.truncate(text.rfind(b"\n") + 1)
            self._columns = next(csv.reader(text.decode(errors="replace").splitlines()[:1]), [])
        if not text.count(b"\n"):
            self._columns = [*row]
            with self._path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writeheader()
        return self._columns


def _step_of(row: Mapping[str, Any]) -> float:
    """The step of a line; of what is left of one, infinity."""
    try:
        return int(row["step"]) if row.get("verdict") else math.inf
    except (KeyError, TypeError, ValueError):
        return math.inf


def find_ledger(trainer: Trainer, ledger: str | Path | bool) -> Ledger | None:
    """Where this process writes the ledger; None for nowhere.

    Raises:
        HAMUMisconfigurationError: If the user's path cannot be written.
    """
    # Asked by all processes: it is a joint call.
    folder = trainer.log_dir if ledger is True and trainer.loggers else None
    if not trainer.is_global_zero or ledger is False:
        return None
    if ledger is True:
        return None if folder is None else Ledger(Path(folder) / "hamu_ledger.csv")
    found = Ledger(Path(ledger))
    found.check()
    return found
