"""Trained models are told apart, fakes among them; benchmarks/verdicts.py does this with many seeds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The names of the benchmark."""
    import runpy

    monkeypatch.setattr(sys, "path", [*sys.path])
    return runpy.run_path(str(ROOT / "benchmarks" / "verdicts.py"))


def test_a_class(benchmark: dict[str, object]) -> None:
    judge_all = benchmark["judge_all"]
    assert callable(judge_all)
    assert {name: verdict.kind for name, verdict in judge_all("digits", "class", 0)} == {
        "original": "not_forgotten",
        "HAMU": "suppressed",
        "retrained": "forgotten",
        "another retrained": "forgotten",
        "five samples": "not_forgotten",
        "shifted logit": "masked",
        "new head": "masked",
    }
