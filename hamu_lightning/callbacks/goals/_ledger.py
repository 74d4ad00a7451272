"""The ledger of verified steps: a CSV file that is written as they go."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Ledger:
    """Appends lines to a CSV file; a resumed run goes on with its file.

    A line may lack some of the columns. One with other columns (of a group that was added) begins a new file,
    `name-2.csv`.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: list[str] = []

    def write(self, row: dict[str, Any]) -> None:
        """Append a line."""
        first, number = self._path, 1
        while not set(row) <= set(self._columns or self._find_columns(row)):
            self._columns, number = [], number + 1
            self._path = first.with_stem(f"{first.stem}-{number}")
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _find_columns(self, row: dict[str, Any]) -> list[str]:
        """The columns of the file; those of `row` where it is new."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+", newline="") as file:
            file.seek(0)
            self._columns = next(csv.reader(file), [])
            if not self._columns:
                self._columns = [*row]
                csv.DictWriter(file, self._columns).writeheader()
        return self._columns


def find_ledger(trainer: Trainer, ledger: str | Path | bool) -> Ledger | None:
    """Where this process writes the ledger; None for nowhere."""
    # Asked by all processes: it is a joint call.
    folder = trainer.log_dir if ledger is True and trainer.loggers else None
    if not trainer.is_global_zero or ledger is False:
        return None
    if ledger is True:
        return None if folder is None else Ledger(Path(folder) / "hamu_ledger.csv")
    return Ledger(Path(ledger))
