"""`hamu-lightning scrub FOLDER`."""

from __future__ import annotations

from hamu_lightning.evidence import scrub as scrub_folder


def scrub(folder: str, apply: bool = False) -> int:
    """Take out of a folder what this package left there and what still remembers.

    Without --apply it only lists. Example: hamu-lightning scrub lightning_logs --apply

    Args:
        folder: The folder; all below it is looked at.
        apply: Do it. Without it nothing is changed, and what would be done is listed.

    Returns:
        0.

    Raises:
        HAMUValueError: If there is no such folder.
        HAMUStateError: If a file cannot be written.
    """
    entries = scrub_folder(folder, dry_run=not apply)
    for entry in entries:
        print(f"{entry.action}: {entry.path} ({entry.what})")
    if not entries:
        print("Nothing was found.")
    elif not apply and any(entry.action != "remains" for entry in entries):
        print("Nothing was changed. --apply does it.")
    return 0
