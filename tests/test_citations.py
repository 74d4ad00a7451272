"""Citations of the documentation lead to a heading that exists, and to an equation that stands below it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("hamu_lightning", "tests", "examples", "benchmarks", "integration", "docs", ".ci")
ENDINGS = {".py", ".md", ".toml", ".cfg", ".txt", ".yaml", ".yml", ".csv", ".json", ""}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Lines of a docstring, a comment or a page may end anywhere inside of a citation.
GAP = r"[ \t]*(?:\n[ \t]*(?:#[ \t]*)?)?"
NUMBER = r"\d+\.\d+"
NUMBERS = rf"{NUMBER}(?:(?:,{GAP}(?:eq\.{GAP})?|{GAP}to{GAP}|{GAP}and{GAP}){NUMBER})*"
CITATION = re.compile(
    r"(?<![\w/.])docs/(?P<page>\w+\.md)#(?P<anchor>[\w-]+)"
    rf"(?:,{GAP}eqs?\.{GAP}(?P<numbers>{NUMBERS}))?"
)
LINK = re.compile(r"\[[^\]]*\]\((?!\w+:)(?P<file>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
EQUATION = re.compile(rf" \(({NUMBER})\)$")
# The name of a page that no user has. In brackets, so that it does not find itself.
PRIVATE = re.compile(r"\bD[E]SIGN\b")


@dataclass(frozen=True)
class Section:
    """A heading of a page, and the equations between it and the next one of its level."""

    title: str
    anchor: str
    level: int
    equations: tuple[str, ...]


def slug(title: str) -> str:
    """GitHub's anchor for a heading: lower case, no punctuation, hyphens for spaces."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def read_sections(text: str) -> list[Section]:
    """The sections of a page; of equal anchors the second ends in -1, as on GitHub."""
    headings: list[tuple[int, str]] = []
    equations: list[list[str]] = []
    is_code = False
    for line in text.splitlines():
        heading = None if is_code else re.match(r"(#{1,6}) +(.+?)\s*#*$", line)
        if line.startswith("```"):
            is_code = not is_code
        elif heading:
            headings.append((len(heading[1]), heading[2]))
            equations.append([])
        elif is_code and equations and (found := EQUATION.search(line)):
            equations[-1].append(found[1])
    sections, seen = [], dict[str, int]()
    for index, (level, title) in enumerate(headings):
        later = (i for i in range(index + 1, len(headings)) if headings[i][0] <= level)
        own = [number for part in equations[index : next(later, len(headings))] for number in part]
        anchor = slug(title)
        seen[anchor] = seen.get(anchor, -1) + 1
        sections.append(Section(title, f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor, level, tuple(own)))
    return sections


def find_faults(text: str, pages: dict[str, list[Section]]) -> list[str]:
    """What is wrong with the citations of a text; `pages` are the sections of the files in docs/ by name."""
    faults = []
    for citation in CITATION.finditer(text):
        where = f"line {text.count(chr(10), 0, citation.start()) + 1}: docs/{citation['page']}#{citation['anchor']}"
        if citation["page"] not in pages:
            faults.append(f"{where}: no such page")
            continue
        sections = {section.anchor: section for section in pages[citation["page"]]}
        if citation["anchor"] not in sections:
            faults.append(f"{where}: no such heading")
            continue
        numbers = re.findall(NUMBER, citation["numbers"] or "")
        known = sections[citation["anchor"]].equations
        faults += [f"{where}: no equation {number} there" for number in numbers if number not in known]
    return faults


def find_broken_links(page: Path) -> list[str]:
    """Links to files that do not exist, or to headings that a page does not have. Code is no link."""
    broken = []
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in LINK.finditer(re.sub(r"`[^`\n]*`", "", text)):
        target = page.parent / link["file"] if link["file"] else page
        is_there = target.exists()
        if is_there and link["anchor"] and target.suffix == ".md":
            anchors = [section.anchor for section in read_sections(target.read_text(encoding="utf-8"))]
            is_there = link["anchor"] in anchors
        if not is_there:
            broken.append(link[0])
    return broken


def text_files() -> Iterator[Path]:
    """What is written by hand: no pictures, no hidden files."""
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    for path in [*sorted(ROOT.glob("*")), *found]:
        if path.is_file() and path.suffix in ENDINGS and not path.name.startswith("."):
            yield path


def read_pages() -> dict[str, list[Section]]:
    return {page.name: read_sections(page.read_text(encoding="utf-8")) for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("folder", FOLDERS)
def test_citations_lead_somewhere(folder: str) -> None:
    pages = read_pages()
    files = [path for path in text_files() if (ROOT / folder) in path.parents and path != Path(__file__)]
    faults = {str(path.relative_to(ROOT)): find_faults(path.read_text(encoding="utf-8"), pages) for path in files}
    assert {path: found for path, found in faults.items() if found} == {}


def test_citations_of_the_pages_at_the_top_lead_somewhere() -> None:
    pages = read_pages()
    faults = {page.name: find_faults(page.read_text(encoding="utf-8"), pages) for page in PAGES[:2]}
    assert {page: found for page, found in faults.items() if found} == {}


def test_equations_are_numbered_by_section() -> None:
    sections = [section for section in read_pages()["method.md"] if section.level == 2]
    assert len(sections) >= 12
    for number, section in enumerate(sections, start=1):
        expected = [f"{number}.{k}" for k in range(1, len(section.equations) + 1)]
        assert list(section.equations) == expected, section.title
        assert expected, section.title


def test_equations_that_the_method_refers_to_exist() -> None:
    """In its own text "(3.2)" means an equation of the page."""
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    known = {number for section in read_sections(text) if section.level == 2 for number in section.equations}
    meant = re.findall(rf"\(({NUMBERS})\)", text)
    assert {number for group in meant for number in re.findall(NUMBER, group)} <= known


def test_files_and_tests_that_the_method_names_exist() -> None:
    """`rules/_radius.py: ScaledRadius` is a file of the package, and the name stands in it."""
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|rules|solvers|optim|metrics|gramian)\b[\w/]*\.py)(?:: ([\w., ]+))?`", text)
    assert len(named) > 60
    for file, names in named:
        path = ROOT / file if file.startswith("tests/") else ROOT / "hamu_lightning" / file
        assert path.exists(), file
        for name in re.findall(r"\w+", names):
            assert re.search(rf"\b(?:def|class) {name}\b", path.read_text(encoding="utf-8")), f"{file}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings(page: Path) -> None:
    assert find_broken_links(page) == []


def test_no_page_is_cited_that_no_user_has() -> None:
    lines = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if PRIVATE.search(line)
    ]
    assert lines == []


# The finder itself ----------------------------------------------------------------------------------------------------

PAGE = """# A page

## First part

```
a = b            (1.1)
c = d            (1.2)
e (1.3) f
```

Not an equation (1.4)

### A `part` of it, in detail

```
# not a heading
g = h            (1.3)
```

## Second part

```
i = j            (2.1)
```

## Second part
"""


def faults_of(text: str) -> list[str]:
    return find_faults(text, {"page.md": read_sections(PAGE)})


def test_sections_and_their_equations() -> None:
    found = [(section.anchor, section.equations) for section in read_sections(PAGE)]
    assert found == [
        ("a-page", ("1.1", "1.2", "1.3", "2.1")),
        ("first-part", ("1.1", "1.2", "1.3")),
        ("a-part-of-it-in-detail", ("1.3",)),
        ("second-part", ("2.1",)),
        ("second-part-1", ()),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "nothing at all",
        "(docs/page.md#first-part)",
        "docs/page.md#first-part, eq. 1.1.",
        "docs/page.md#first-part, eq. 1.1, 1.2 and 1.3; eq. 9.9 is of something else",
        "docs/page.md#first-part, eq. 1.1, eq. 1.3",
        "docs/page.md#first-part, eqs. 1.1 to 1.3",
        "docs/page.md#second-part, eq. 2.1; docs/page.md#a-part-of-it-in-detail, eq. 1.3",
        "    docs/page.md#first-part,\n    eq. 1.1",
        "# docs/page.md#first-part, eq.\n    # 1.1",
        "docs/page.md#first-part, 2.5 of something else",
    ],
)
def test_good_citations(text: str) -> None:
    assert faults_of(text) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("docs/other.md#first-part", "no such page"),
        ("docs/page.md#third-part", "no such heading"),
        ("docs/page.md#First-part", "no such heading"),
        ("docs/page.md#not-a-heading, eq. 1.1", "no such heading"),
        ("docs/page.md#first-part, eq. 1.4", "no equation 1.4"),
        ("docs/page.md#second-part, eq. 1.1", "no equation 1.1"),
        ("docs/page.md#a-part-of-it-in-detail, eq. 1.1", "no equation 1.1"),
        ("docs/page.md#first-part, eq. 1.1 and 2.1", "no equation 2.1"),
        ("docs/page.md#first-part, eq. 1.1, eq. 2.1", "no equation 2.1"),
        ("docs/page.md#first-part, eqs. 1.1 to 2.1", "no equation 2.1"),
        ("a docstring\n    (docs/page.md#first-part,\n    eq. 2.1) goes on", "line 2"),
        ("# a comment: docs/page.md#first-part, eq.\n# 2.1", "no equation 2.1"),
    ],
)
def test_bad_citations_are_found(text: str, fault: str) -> None:
    (found,) = faults_of(text)
    assert fault in found


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE)
    page = tmp_path / "links.md"
    good = "[a](page.md) [b](page.md#second-part-1) [c](#top) [d](https://x.y/z#w) `[e](none.md)`\n"
    page.write_text(f"# Top\n\n{good}\n```\n[f](none.md)\n```\n")
    assert find_broken_links(page) == []
    page.write_text(f"# Top\n\n{good} [g](page.md#third-part) [h](none.md) [i](#bottom)\n")
    assert find_broken_links(page) == ["[g](page.md#third-part)", "[h](none.md)", "[i](#bottom)"]


def test_the_private_page_is_found_by_its_name_alone() -> None:
    name = "DE" + "SIGN"
    assert PRIVATE.search(f"see {name} 1.2") and PRIVATE.search(f"({name}, section 4)")
    assert not PRIVATE.search(f"a design, {name}ED")
