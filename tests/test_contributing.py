"""The example of CONTRIBUTING.md is a whole file that works, and its test entry passes."""

from __future__ import annotations

import doctest
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.rules import test_baselines

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
FILE, ENTRY = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_new_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(FILE.splitlines()) <= 40
    assert max(map(len, FILE.splitlines())) <= 120
    module = ModuleType("take_turns")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look names up
    exec(FILE + "\n" + ENTRY, vars(module))
    assert doctest.testmod(module) == (0, 3)
    rule, oracle = module.entry
    for conflict in (True, False):
        test_baselines.test_the_weights_take_the_papers_step(rule, oracle, conflict)
        test_baselines.test_groups_share_one_problem(rule, oracle, conflict)
        test_baselines.test_a_trainer_takes_the_papers_step(rule, oracle, conflict)
    test_baselines.test_one_bad_number_stops_every_block(rule)
    test_baselines.test_a_step_reads_nothing_on_the_host(rule, "global")
