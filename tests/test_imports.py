"""What an import loads, what the package exports, and what no file may mention."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_origin

import pytest

import hamu_lightning

ROOT = Path(__file__).parents[1]
HEAVY = {
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "torchmetrics",
    "qpsolvers",
    "osqp",
    "torchjd",
    "matplotlib",
}
PACKAGE = ROOT / "hamu_lightning"
PUBLIC = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name == "__init__.py" or (path.parent == PACKAGE and path.name != "errors.py")
)


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Names of the top-level modules that a fresh interpreter holds after it has imported one package after another."""
    names = ("hamu_lightning", "hamu_lightning.rules", "hamu_lightning.optim", "hamu_lightning.solvers")
    look = "print(*{name.partition('.')[0] for name in sys.modules})"
    code = "\n".join(["import sys", *(f"import {name}\n{look}" for name in names)])
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name: set(line.split()) for name, line in zip(names, result.stdout.splitlines(), strict=True)}


def test_rules_load_torch_alone(loaded: dict[str, set[str]]) -> None:
    assert "torch" in loaded["hamu_lightning.rules"]
    assert not loaded["hamu_lightning.rules"] & HEAVY


def test_optim_loads_no_lightning(loaded: dict[str, set[str]]) -> None:
    assert not loaded["hamu_lightning.optim"] & (HEAVY - {"qpsolvers", "osqp"})


def test_solvers_load_torchjd_only_when_asked(loaded: dict[str, set[str]]) -> None:
    assert "torchjd" not in loaded["hamu_lightning.solvers"]


def test_the_root_loads_nothing(loaded: dict[str, set[str]]) -> None:
    assert not loaded["hamu_lightning"] & (HEAVY | {"torch", "numpy"})


@pytest.mark.parametrize("name", hamu_lightning.__all__)
def test_a_lazy_name_is_the_object_of_its_layer(name: str) -> None:
    homes = ("rules", "optim", "callbacks", "data", "evidence", "gramian", "methods")
    layers = [importlib.import_module(f"hamu_lightning.{home}") for home in homes]
    owners = [layer for layer in layers if name in layer.__all__]
    assert len(owners) == 1
    assert getattr(hamu_lightning, name) is getattr(owners[0], name)
    assert name in dir(hamu_lightning)


def test_from_import_resolves_a_lazy_name() -> None:
    from hamu_lightning import HAMUCallback
    from hamu_lightning.callbacks import HAMUCallback as expected

    assert HAMUCallback is expected


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert hasattr(hamu_lightning, "HAMUQ")
    with pytest.raises(AttributeError, match="has no attribute 'HAMUX'"):
        _ = hamu_lightning.HAMUX  # type: ignore[attr-defined]


@pytest.mark.parametrize("module_name", PUBLIC)
def test_public_objects_have_docstrings(module_name: str) -> None:
    module = importlib.import_module(module_name)
    assert module.__doc__
    exported = {name: getattr(module, name) for name in module.__all__}
    # Type aliases and constants have no docstring of their own.
    # (Python 3.10 takes aliases for classes.)
    own = {name: obj for name, obj in exported.items() if get_origin(obj) is None}
    documented = {name: obj for name, obj in own.items() if inspect.isclass(obj) or inspect.isroutine(obj)}
    # A dataclass or a named tuple without one gets its own signature.
    bare = [name for name, obj in documented.items() if not obj.__doc__ or obj.__doc__.startswith(f"{name}(")]
    # ruff leaves out files whose name starts with an underscore, which are most of ours.
    for obj in filter(inspect.isclass, documented.values()):
        members = {f"{obj.__name__}.{name}": getattr(obj, name) for name in vars(obj) if not name.startswith("_")}
        methods = {name: m for name, m in members.items() if inspect.isroutine(m) or isinstance(m, property)}
        bare += [name for name, member in methods.items() if not inspect.getdoc(member)]
    assert bare == []


def test_no_file_mentions_a_machine() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    # In pieces, so that this file does not mention them either.
    forbidden = re.compile("|".join(("/" + "root/", "/" + "tmp/w", "/" + "work/", "/" + "home/")))
    found = []
    for path in (ROOT / name for name in names):
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError, IsADirectoryError):
            continue  # deleted but not yet committed, or a picture
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in forbidden.finditer(text)]
    assert found == []
