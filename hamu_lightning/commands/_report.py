"""`hamu-lightning report`: the page from the files of a run."""

from __future__ import annotations

from pathlib import Path

from hamu_lightning.evidence import report_folder
from hamu_lightning.files import write_whole


def report(logdir: str, out: str | None = None) -> int:
    """Write the report of a run as one HTML page.

    It is made from the record, the ledger and the event files in a folder, as far as they are there.

    Example: hamu-lightning report lightning_logs/version_0

    Args:
        logdir: Folder of the run.
        out: The page; default: report.html in the folder.
    """
    path = Path(logdir) / "report.html" if out is None else Path(out)
    page = report_folder(logdir)
    write_whole(path, lambda file: file.write(page.encode()))
    print(path)
    return 0
