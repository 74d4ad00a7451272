"""Records of questions and answers in files of any size: found by their place, checked once, read one by one."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from hamu_lightning.checks import describe
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.text._extra import check_installed
from hamu_lightning.text._layouts import QARecord, parse_record

Files: TypeAlias = "str | PathLike[str] | Sequence[str | PathLike[str]]"
See: TypeAlias = Callable[[int, Mapping[str, Any]], "str | None"]
SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
# So many faults are told one by one.
_MOST_FAULTS = 10


class Records(Sequence[QARecord]):
    """The records of local files, numbered through in the order of the files, read from the disk one by one.

    In memory there are 8 bytes for each line of JSON or text, and for Parquet one row group. All records are read
    and checked once, when this object is made.

    Args:
        files: A folder, a file, or several: `.jsonl` and `.json` (an object in each line), `.parquet`, `.txt` (a text
            in each line). Blank lines are left out. See `parse_record` for the layouts.
        see: Is called with each record's number and columns, in the pass that checks them; returns a fault, or None.

    Raises:
        HAMUValueError: If there is no such file, or records are malformed: file, line and fault of the first ones, and
            never what stands there.
        MissingTextExtraError: If there are Parquet files, and pyarrow is not installed.
    """

    def __init__(self, files: Files, see: See = lambda number, row: None) -> None:
        self._files = [_open(path) for path in find_files(files)]
        self._ends: list[int] = []
        faults: list[str] = []
        count = 0
        for file in self._files:
            for place, row in file.scan():
                fault = row if isinstance(row, str) else _fault(row) or see(count, row)
                if fault is not None:
                    faults.append(f"{file.path.name}, {file.unit} {place}: {fault}")
                count += 1
            self._ends.append(count)
        if faults:
            raise HAMUValueError(_tell(faults))
        if not count:
            raise HAMUValueError("Expected files with at least one record, but got empty ones. Give others.")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        """Return a record by its number, or a list of them by a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        which = bisect_right(self._ends, position)
        start = self._ends[which - 1] if which else 0
        return parse_record(self._files[which].read(position - start))


def find_files(files: Files) -> list[Path]:
    """Return the files of a folder, sorted by name, or those that were given.

    Raises:
        HAMUValueError: If there are none, or they are of an unknown kind.
    """
    given = [files] if isinstance(files, str | PathLike) else files
    if not isinstance(given, Sequence) or not all(isinstance(path, str | PathLike) for path in given):
        raise HAMUValueError(f"Expected a folder or files, but got {describe(files)}.")
    paths = list(chain.from_iterable(_in_folder(Path(path)) for path in given))
    missing = [path.name for path in paths if not path.is_file() or path.suffix not in SUFFIXES]
    if missing or not paths:
        what = ", ".join(missing[:3]) if missing else "a folder without any"
        raise HAMUValueError(
            f"Expected local files that end in {', '.join(SUFFIXES)}, but got {what}. Nothing is downloaded."
        )
    return paths


def _in_folder(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.suffix in SUFFIXES) if path.is_dir() else [path]


@dataclass
class _Lines:
    """A file with a record in each line."""

    path: Path
    unit: str = "line"

    def __post_init__(self) -> None:
        self._offsets = array("q")
        self._parse = _from_text if self.path.suffix == ".txt" else _from_json

    def scan(self) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
        """Yield line number and columns, or the fault, and note where each record begins."""
        with self.path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._offsets.append(offset)
                    yield number, self._parse(line)
                offset += len(line)

    def read(self, index: int) -> Any:
        # Opened anew: workers of a loader must not share a position.
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            return self._parse(file.readline())


@dataclass
class _Rows:
    """A Parquet file."""

    path: Path
    unit: str = "row"

    def __post_init__(self) -> None:
        check_installed("pyarrow", "Parquet files")
        from pyarrow.parquet import ParquetFile

        with ParquetFile(self.path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._ends = list(accumulate(sizes))
        self._group: tuple[int, Any] = (-1, None)

    def scan(self) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(self.path) as file:
            rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)

    def read(self, index: int) -> Any:
        group = bisect_right(self._ends, index)
        start = self._ends[group - 1] if group else 0
        return self._table(group).slice(index - start, 1).to_pylist()[0]

    def _table(self, group: int) -> Any:
        """A row group; the last one is kept."""
        from pyarrow.parquet import ParquetFile

        if self._group[0] != group:
            with ParquetFile(self.path) as file:
                self._group = (group, file.read_row_group(group))
        return self._group[1]

    def __getstate__(self) -> dict[str, Any]:
        """Rows do not go into a pickle."""
        return {**vars(self), "_group": (-1, None)}


def _open(path: Path) -> _Lines | _Rows:
    return _Rows(path) if path.suffix == ".parquet" else _Lines(path)


def _from_text(line: bytes) -> Mapping[str, Any] | str:
    try:
        return {"text": line.decode().strip()}
    except UnicodeDecodeError:
        return "it is not in UTF-8"


def _from_json(line: bytes) -> Mapping[str, Any] | str:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return "it is not in UTF-8"
    except ValueError:  # json's own message quotes nothing, but its error holds the line
        return "it is no JSON"
    return row if isinstance(row, dict) else "it is no JSON object"


def _fault(row: Mapping[str, Any]) -> str | None:
    try:
        parse_record(row)
    except HAMUValueError as error:
        return str(error)
    return None


def _tell(faults: list[str]) -> str:
    more = f"; and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
    return (
        f"Expected records of questions and answers, but {len(faults)} cannot be read: "
        f"{'; '.join(faults[:_MOST_FAULTS])}{more}. Mend or remove these lines."
    )
