"""The documentation names tests and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def named_tests() -> list[tuple[str, str]]:
    """Each `file.py::test`; `::test` alone belongs to the last file named in its line."""
    found = []
    for line in (ROOT / "docs" / "settings.md").read_text().splitlines():
        file = ""
        for name, test in re.findall(r"`(tests/\w+/test_\w+\.py|test_\w+\.py)?(?:::(\w+))?`", line):
            file = name or file
            if file:
                found.append((file if "/" in file else f"tests/callbacks/{file}", test))
    return found


def test_every_test_that_is_named_exists() -> None:
    names = named_tests()
    assert len(names) > 60
    for file, test in names:
        assert f"def {test}" in (ROOT / file).read_text(), f"{file}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
