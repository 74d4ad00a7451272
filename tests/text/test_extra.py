"""Without the extra: the rest works, and this package says what to install."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import hamu_lightning.text
from hamu_lightning.text import MissingTextExtraError, check_installed

FILES = sorted(Path(hamu_lightning.text.__file__).parent.glob("*.py"))
EXTRA = {"transformers", "peft", "tokenizers", "safetensors", "pyarrow", "nltk"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_extra_is_imported_inside_functions(file: Path) -> None:
    body = ast.parse(file.read_text()).body
    names = [n for x in body if isinstance(x, ast.Import) for n in (alias.name for alias in x.names)]
    names += [x.module or "" for x in body if isinstance(x, ast.ImportFrom)]
    assert not EXTRA & {name.partition(".")[0] for name in names}


def test_without_the_extra_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hamu_lightning.text._extra.find_spec", lambda name: None)
    with pytest.raises(MissingTextExtraError, match=r"it is not installed. Run: pip install 'hamu_lightning\[text\]'"):
        importlib.reload(hamu_lightning.text)
    with pytest.raises(ImportError, match="Expected pyarrow for Parquet files"):
        check_installed("pyarrow", "Parquet files")
