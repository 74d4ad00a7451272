"""The documentation names tests and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from torch.utils.data import DataLoader

from hamu_lightning import HAMUCallback
from hamu_lightning.callbacks import StepOptions
from tests.callbacks.modules import Base, build, fit, make_data

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def named_tests() -> list[tuple[str, str]]:
    """Each `file.py::test`; `::test` alone belongs to the last file named in its line."""
    found = []
    for line in (ROOT / "docs" / "settings.md").read_text().splitlines():
        file = ""
        for name, test in re.findall(r"`(tests/[\w/]+/test_\w+\.py|test_\w+\.py)?(?:::(\w+))?`", line):
            file = name or file
            if file:
                found.append((file, test))
    return found


def find_test_file(name: str) -> Path:
    """The file of this path, or of this name in `tests/callbacks/` or one of its rooms."""
    (path,) = [ROOT / name] if "/" in name else (ROOT / "tests" / "callbacks").rglob(name)
    return path


def test_every_test_that_is_named_exists() -> None:
    names = named_tests()
    assert len(names) > 60
    for file, test in names:
        assert f"def {test}" in find_test_file(file).read_text(), f"{file}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_anchors_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        assert anchor in anchors_of(page.parent / target if target else page), f"{target}#{anchor}"


def test_the_site_has_every_page() -> None:
    """`make docs` finds this too, and needs an environment of its own."""
    listed = yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert [page.name for page in PAGES[1:] if f": {page.name}\n" not in listed] == []


def test_every_logged_name_is_explained() -> None:
    """Of a verified fit with a target that tracks the actual change."""
    hamu = HAMUCallback(
        DataLoader(make_data(40, seed=9), batch_size=20), target=5.0, steps=StepOptions(track_actual=True)
    )
    with pytest.warns(UserWarning, match="before the target"):
        trainer, _ = fit(build(Base), hamu, log_every_n_steps=1, max_epochs=1)
    explained = (ROOT / "docs" / "logged.md").read_text()
    names = [name for name in trainer.callback_metrics if name.startswith(("hamu/", "retain/", "forget/loss"))]
    assert len(names) > 20
    assert [name for name in names if f"`{name}`" not in explained] == []


def test_the_map_names_every_file_of_the_callback() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    files = {path.name for path in (ROOT / "hamu_lightning" / "callbacks").rglob("_*.py")} - {"__init__.py"}
    assert len(files) > 40
    assert {name for name in files if f"`{name}`" not in text} == set()


def test_workflows_call_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert "make test" in commands
    assert {command.removeprefix("make ") for command in commands} <= targets
