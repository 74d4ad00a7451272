"""What the site holds besides the pages of docs/: README, CONTRIBUTING, CHANGELOG, and the reference."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

from griffe import Extension, Object
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hamu_lightning"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
EQUATION = re.compile(r"(\S.*?) {2,}(\(\d+\.\d+\))")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)")


class Examples(Extension):
    """Calls the section of examples by the name that griffe knows, so that doctests become blocks of code."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        """Rename it in one docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages of the reference in the navigation, and load the packages from this folder."""
    config.nav[-1]["Reference"] = ["api/index.md", *({name: f"api/{name}.md"} for name in find_public())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    for tutorial in sorted((ROOT / "docs" / "tutorials").glob("*.py")):
        files.append(File.generated(config, f"tutorials/{tutorial.stem}.md", content=as_markdown(tutorial)))
    public = find_public()
    files.append(File.generated(config, "api/index.md", content=list_packages(public)))
    for name, path in public.items():
        files.append(File.generated(config, f"api/{name}.md", content=describe(name, path)))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: object) -> str:
    """Lead links of the repository to pages of the site; those to other files become plain text."""

    def lead(match: re.Match[str]) -> str:
        text, target, anchor = match.groups(default="")
        path = target.removeprefix("../")
        if path in PAGES or not (ROOT / path).is_file():
            return f"[{text}]({PAGES.get(path, target)}{anchor})"
        return text

    if page.file.src_uri.startswith("api/"):
        return markdown
    return re.sub(r"^```\n.*?^```$", draw_in_numbers, LINK.sub(lead, markdown), flags=re.DOTALL | re.MULTILINE)


def draw_in_numbers(block: re.Match[str]) -> str:
    """Put the numbers of equations beside the longest one of their block: they are out of sight at column 120."""
    lines = [EQUATION.fullmatch(line) or line for line in block[0].split("\n")]
    width = max((len(line[1]) for line in lines if isinstance(line, re.Match)), default=0)
    return "\n".join(line if isinstance(line, str) else f"{line[1]:{width}}   {line[2]}" for line in lines)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Make links of what docstrings cite, `docs/method.md#radii`."""

    def cite(match: re.Match[str]) -> str:
        url = get_relative_url(f"{match[1]}.html", page.url)
        return f'<a href="{url}{match[2] or ""}">{match[0]}</a>'

    return re.sub(r"docs/(\w+)\.md(#[\w-]+)?", cite, html) if page.file.src_uri.startswith("api/") else html


def as_markdown(tutorial: Path) -> str:
    """A program in percent format (`# %%` begins a cell) as a page."""
    text = []
    for cell in re.split(r"^# %%", tutorial.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        is_text = kind.strip() == "[markdown]"
        text.append(re.sub(r"^# ?", "", body, flags=re.MULTILINE) if is_text else f"```python\n{body.strip()}\n```")
    return "\n".join(text)


def find_public() -> dict[str, Path]:
    """The packages and modules that users import from, with their files. Rooms of the callback are its own matter."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        is_private = any(part.startswith("_") and part != "__init__" for part in parts)
        if not is_private and not name.startswith("hamu_lightning.callbacks."):
            found[name] = path
    return found


def read_exports(path: Path) -> list[str]:
    """The names in `__all__`, without an import; where there is none, the classes of the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def first_line(path: Path) -> str:
    """What the docstring of a file says in its first line."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def list_packages(public: dict[str, Path]) -> str:
    """The first page of the reference."""
    lines = ["# Reference", "", "Everything public, from the docstrings.", "", "| package | holds |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| [`{name}`]({name}.md) | {first_line(path)} |" for name, path in public.items())])


def describe(name: str, path: Path) -> str:
    """The page of one package. The root's names stand at the packages that they come from."""
    exports = read_exports(path)
    if name == "hamu_lightning":
        homes = ast.literal_eval(re.search(r"_HOMES = (\{.*?\})", path.read_text(encoding="utf-8"), re.DOTALL)[1])
        lines = [f"- [`{export}`][{name}.{homes[export]}.{export}]" for export in sorted(exports)]
        return "\n".join([f"# {name}", "", first_line(path), "", *lines])
    blocks = [f"::: {name}.{export}" for export in exports]
    return "\n\n".join([f"# {name}", first_line(path), *blocks])
