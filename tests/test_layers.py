"""The layers: imports point only downwards, and each heavy dependency has one home."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hamu_lightning"

# From bottom to top: a layer may import itself and what stands before it.
LAYERS = (
    "errors",
    "checks",
    "gramian",
    "tolerances",
    "randomness",
    "loaders",
    "rules",
    "solvers",
    "optim",
    "objectives",
    "metrics",
    "report",
    "callbacks",
    "methods",
)
# The only layers that may import these; what is not named here may be imported anywhere that PURE allows.
HOMES = {
    "lightning": {"callbacks", "report", "methods"},
    "lightning_fabric": {"callbacks"},
    "pytorch_lightning": {"callbacks"},
    "torchmetrics": {"metrics", "report", "callbacks", "methods"},
    "matplotlib": {"report"},
    "qpsolvers": {"solvers"},
    "osqp": {"solvers"},
    "torchjd": {"solvers"},
}
# Layers that import torch, the standard library and the backport of typing, and nothing else.
PURE = {"errors", "checks", "gramian", "tolerances", "loaders", "rules"}
PURE_IMPORTS = {"torch", "typing_extensions", "hamu_lightning"} | sys.stdlib_module_names

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def find_imports(source: str) -> Iterator[str]:
    """Full names of all modules that a file imports, in functions and under `TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "relative"
            elif node.module == "hamu_lightning":  # the names may be layers, or names that the root resolves lazily
                yield from (f"hamu_lightning.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def find_faults(layer: str, imports: Iterator[str]) -> list[str]:
    faults = []
    for name in imports:
        top = name.partition(".")[0]
        if top == "hamu_lightning":
            target = name.split(".")[1] if "." in name else "the root"
            if target not in LAYERS:
                faults.append(f"{name}: name the layer that a name lives in")
            elif LAYERS.index(target) > LAYERS.index(layer):
                faults.append(f"{name}: `{target}` lies above `{layer}`")
        elif top == "relative":
            faults.append("relative import: write the full name")
        elif layer not in HOMES.get(top, {layer}):
            faults.append(f"{name}: only in {sorted(HOMES[top])}")
        elif layer in PURE and top not in PURE_IMPORTS:
            faults.append(f"{name}: `{layer}` imports torch and the standard library alone")
    return faults


def test_every_module_is_in_a_layer() -> None:
    assert {layer_of(path) for path in FILES} <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    assert find_faults(layer_of(path), find_imports(path.read_text(encoding="utf-8"))) == []


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
