"""Reads which file of the package imports which, without running any of it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter


@dataclass(frozen=True)
class Imported:
    """One import.

    Args:
        module: The full name of the module that is imported, or that a name is imported from.
        name: What is imported from it; None for `import module`.
    """

    module: str
    name: str | None = None

    @property
    def full(self) -> str:
        return self.module if self.name is None else f"{self.module}.{self.name}"


def find_imports(source: str) -> Iterator[Imported]:
    """All imports of a file, in functions and under `TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Imported(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (Imported(module, alias.name) for alias in node.names)


@dataclass(frozen=True)
class Package:
    """The files of a package.

    Args:
        sources: For each module its source, by its full name.
        packages: Which of the modules are the `__init__.py` of a package.
    """

    sources: Mapping[str, str]
    packages: frozenset[str]

    @cached_property
    def imports(self) -> dict[str, list[Imported]]:
        """For each module what it imports."""
        return {module: list(find_imports(source)) for module, source in self.sources.items()}

    def define(self, imported: Imported) -> str | None:
        """The module that defines what is imported; None outside of the package.

        A package hands on names from its own files: what counts is the file, not the package.
        """
        if imported.name is not None and imported.full in self.sources:
            return imported.full
        if imported.module not in self.packages or imported.name is None:
            return imported.module if imported.module in self.sources else None
        handed_on = [found for found in self.imports[imported.module] if found.name == imported.name]
        return self.define(handed_on[0]) if handed_on else imported.module

    def edges(self, module: str) -> set[str]:
        """The modules that define what a module imports."""
        return {found for found in map(self.define, self.imports[module]) if found is not None} - {module}

    def find_circle(self, modules: Iterable[str]) -> list[str]:
        """Modules that import each other in a circle, the first one again at the end; empty where there is none.

        The `__init__.py` of a package imports for its users, and is no part of a circle.
        """
        nodes = set(modules) - self.packages
        try:
            TopologicalSorter({node: self.edges(node) & nodes for node in nodes}).prepare()
        except CycleError as error:
            return list(error.args[1])
        return []

    def home(self, module: str) -> str:
        """The package that a module is in; a package is in itself."""
        return module if module in self.packages else module.rpartition(".")[0]

    def find_private(self, module: str, shared: tuple[str, ...] = ()) -> set[str]:
        """The private modules and names of other packages that a module imports.

        Args:
            module: The module.
            shared: Private names that all packages inside of their own one may import.
        """
        found = {private for private in map(find_private_part, self.imports[module]) if private is not None}
        home = self.home(module)

        def is_own(private: str) -> bool:
            owner, _, name = private.rpartition(".")
            return owner == home or (name in shared and home.startswith(f"{owner}."))

        return {private for private in found if private.partition(".")[0] in self.packages and not is_own(private)}


def find_private_part(imported: Imported) -> str | None:
    """What is private in an import, down to the first name with an underscore; None where nothing is."""
    parts = imported.full.split(".")
    hidden = [number for number, part in enumerate(parts) if part.startswith("_") and not part.endswith("__")]
    return ".".join(parts[: hidden[0] + 1]) if hidden else None
