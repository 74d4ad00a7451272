"""The layers: imports point only downwards and in no circle, and each heavy dependency has one home."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.import_graph import Imported, Package, find_imports

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hamu_lightning"

# From bottom to top: a layer may import itself and what stands before it.
LAYERS = (
    "errors",
    "checks",
    "wording",
    "gramian",
    "tolerances",
    "randomness",
    "loaders",
    "files",
    "rules",
    "solvers",
    "optim",
    "objectives",
    "metrics",
    "report",
    "text",
    "callbacks",
    "data",
    "methods",
    "evidence",
    "commands",
)
# The only layers that may import these; what is not named here may be imported anywhere that PURE allows.
HOMES = {
    "lightning": {"callbacks", "report", "text", "data", "methods", "evidence", "commands"},
    "lightning_fabric": {"callbacks"},
    "pytorch_lightning": {"callbacks"},
    "torchmetrics": {"metrics", "report", "text", "callbacks", "methods"},
    "transformers": {"text"},
    "peft": {"text"},
    "tokenizers": {"text"},
    "safetensors": {"text"},
    "pyarrow": {"text"},
    "nltk": {"text"},
    "jinja2": {"evidence"},
    "cryptography": {"evidence"},
    "jsonargparse": {"commands"},
    "matplotlib": {"report"},
    "qpsolvers": {"solvers"},
    "osqp": {"solvers"},
    "torchjd": {"solvers"},
}
# Layers that import torch, the standard library and the backport of typing, and nothing else.
PURE = {"errors", "checks", "wording", "gramian", "tolerances", "loaders", "files", "rules"}
PURE_IMPORTS = {"torch", "typing_extensions", "hamu_lightning"} | sys.stdlib_module_names

# Private files and names that a module of another package may import: for each importer and what it imports the reason.
PRIVATE: dict[tuple[str, str], str] = {}
MOST_PRIVATE = 8
# What the packages inside of a package share: all that Lightning keeps private is touched in two files, and what cannot
# work is refused by one kind of error.
SHARED = ("_compat", "_compat_bar", "_compat_loaders", "_refusal")

MOST_LINES = 350
FOLDERS = ("hamu_lightning", "tests", "examples", "benchmarks", "integration")

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = Package(
    {name_of(path): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")},
    frozenset(name_of(path) for path in PACKAGE.rglob("__init__.py")),
)


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules_of(layer: str) -> list[str]:
    return [name_of(path) for path in FILES if layer_of(path) == layer]


def find_faults(layer: str, imports: Iterable[Imported]) -> list[str]:
    faults = []
    for imported in imports:
        if imported.module.startswith("."):
            faults.append("relative import: write the full name")
            continue
        # The names may be layers, or names that the root resolves lazily.
        name = imported.full if imported.module == "hamu_lightning" else imported.module
        top = name.partition(".")[0]
        if top == "hamu_lightning":
            target = name.split(".")[1] if "." in name else "the root"
            if target not in LAYERS:
                faults.append(f"{name}: name the layer that a name lives in")
            elif LAYERS.index(target) > LAYERS.index(layer):
                faults.append(f"{name}: `{target}` lies above `{layer}`")
        elif layer not in HOMES.get(top, {layer}):
            faults.append(f"{name}: only in {sorted(HOMES[top])}")
        elif layer in PURE and top not in PURE_IMPORTS:
            faults.append(f"{name}: `{layer}` imports torch and the standard library alone")
    return faults


def find_long_files(folder: Path) -> dict[str, int]:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py")}
    return {str(path.relative_to(folder)): length for path, length in lengths.items() if length > MOST_LINES}


def test_every_module_is_in_a_layer() -> None:
    assert {layer_of(path) for path in FILES} <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    assert find_faults(layer_of(path), find_imports(path.read_text(encoding="utf-8"))) == []


# Layers import downwards: a circle lies within one of them.
@pytest.mark.parametrize("layer", LAYERS)
def test_no_imports_in_a_circle(layer: str) -> None:
    assert MODULES.find_circle(modules_of(layer)) == []


@pytest.mark.parametrize("layer", LAYERS)
def test_private_files_are_imported_by_their_own_package(layer: str) -> None:
    allowed = {pair for pair in PRIVATE if pair[0].split(".")[1] == layer}
    found = {(module, private) for module in modules_of(layer) for private in MODULES.find_private(module, SHARED)}
    assert found == allowed


def test_few_private_imports_are_allowed() -> None:
    assert len(PRIVATE) <= MOST_PRIVATE
    assert all(PRIVATE.values())


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_long(folder: str) -> None:
    assert find_long_files(ROOT / folder) == {}


@pytest.mark.parametrize(
    ("layer", "source", "fault"),
    [
        ("rules", "from hamu_lightning.optim import HAMUOptimizer", "lies above"),
        ("rules", "def f():\n    from hamu_lightning.metrics import Hardness", "lies above"),
        ("rules", "if TYPE_CHECKING:\n    import hamu_lightning.callbacks", "lies above"),
        ("callbacks", "from hamu_lightning import HAMUQ", "name the layer"),
        ("callbacks", "from . import x", "relative"),
        ("gramian", "import numpy as np", "torch and the standard library"),
        ("rules", "from torchmetrics import Metric", "only in"),
        ("metrics", "import lightning.pytorch", "only in"),
        ("callbacks", "import matplotlib.pyplot as plt", "only in"),
        ("optim", "import qpsolvers", "only in"),
    ],
)
def test_faults_are_found(layer: str, source: str, fault: str) -> None:
    (found,) = find_faults(layer, find_imports(source))
    assert fault in found


def make_package(**sources: str) -> Package:
    """A package `p` with a package `p.inner`; `a__b` stands for the file `a/b.py`."""
    named = {f"p.{name.replace('__', '.')}": source for name, source in sources.items()}
    return Package({"p": "", "p.inner": "from p.inner._file import f", **named}, frozenset({"p", "p.inner"}))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("from p._b import x", "from p._a import y"),
        ("import p._b", "from p import _a"),
        ("if TYPE_CHECKING:\n    from p._b import x", "import p._a"),
        ("def f():\n    from p._b import x", "import p._a"),
        ("from p.inner import f", ""),  # which is defined in a file that imports this one
    ],
)
def test_circles_are_found(a: str, b: str) -> None:
    package = make_package(_a=a, _b=b, inner___file="from p._a import g")
    circle = package.find_circle(package.sources)
    assert circle[0] == circle[-1] and len(circle) == 3
    assert "p._a" in circle


def test_what_a_package_hands_on_makes_no_circle() -> None:
    package = make_package(_a="from p._b import x", _b="", inner___file="from p._a import g")
    assert package.edges("p.inner") == {"p.inner._file"}
    assert package.find_circle(package.sources) == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("_a", "from p.inner import f", set()),
        ("_a", "from p import _b, _compat", set()),
        ("_a", "from p.inner._file import f", {"p.inner._file"}),
        ("_a", "import p.inner._file", {"p.inner._file"}),
        ("_a", "from p.inner import _file", {"p.inner._file"}),
        ("_a", "def f():\n    from p.inner import _file", {"p.inner._file"}),
        ("_a", "from p.b import _hidden", {"p.b._hidden"}),
        ("_a", "from p import __version__\nfrom torch._subclasses import FakeTensorMode", set()),
        ("inner___a", "from p.inner._file import f", set()),
        ("inner___a", "from p import _compat", set()),
        ("inner___a", "from p._compat import g", set()),
        ("inner___a", "from p._b import g", {"p._b"}),
    ],
)
def test_private_imports_are_found(module: str, source: str, found: set[str]) -> None:
    package = make_package(**{module: source, "_b": "", "b": "", "_compat": "", "inner___file": ""})
    name = f"p.{module.replace('__', '.', 1)}"
    assert package.find_private(name, SHARED) == found


def test_long_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "short.py").write_text("x = 1\n" * MOST_LINES)
    (tmp_path / "inner" / "long.py").write_text("x = 1\n" * (MOST_LINES + 1))
    assert find_long_files(tmp_path) == {"inner/long.py": MOST_LINES + 1}
