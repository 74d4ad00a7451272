"""The examples import each other by their file names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

EXAMPLES = str(Path(__file__).parents[2] / "examples")


@pytest.fixture(scope="session", autouse=True)
def _examples_on_path() -> Iterator[None]:
    sys.path.insert(0, EXAMPLES)
    yield
    sys.path.remove(EXAMPLES)


@pytest.fixture
def short_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out six of the nine blocks of the network for digits, where a test is not about the network."""
    import digits

    whole = digits.make_resnet20

    def make_short(*args: Any, **settings: Any) -> nn.Sequential:
        net = whole(*args, **settings)
        return nn.Sequential(*net[:4], net[6], net[9], *net[12:])  # the first block of each stage

    monkeypatch.setattr(digits, "make_resnet20", make_short)
