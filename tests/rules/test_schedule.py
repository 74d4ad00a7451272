"""Schedules: which rule makes which step, and which rules can take turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.rules import HAMUQ, Alternate, FineTune, GradAscent, Rule, Schedule, TargetQuota, check_schedule
from hamu_lightning.solvers import FeasibleDirection


def turns(schedule: Schedule, epochs: int, steps: int) -> list[str]:
    """A string for each epoch, a digit for each step: the index of its rule."""
    return [
        "".join(str(schedule.rules.index(schedule.rule_at(epoch, step))) for step in range(steps))
        for epoch in range(epochs)
    ]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Alternate(1), ["0000", "1111", "1111", "1111", "1111"]),
        (Alternate(2), ["0000", "1111", "0000", "1111", "1111"]),
        (Alternate(2, 1), ["0111", "0111", "1111", "1111", "1111"]),
        (Alternate(max_epochs=1, max_steps=9), ["0000", "1111", "1111", "1111", "1111"]),
    ],
    ids=repr,
)
def test_turns(schedule: Schedule, expected: list[str]) -> None:
    assert turns(schedule, 5, 4) == expected


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(5, 9))
def test_so_many_max_steps_and_the_repair_comes_last(max_epochs: int, max_steps: int, steps: int, epochs: int) -> None:
    parts = "".join(turns(Alternate(max_epochs, max_steps), epochs, steps))
    assert parts.count("0") == max_epochs * min(max_steps, steps)
    whole = turns(Alternate(max_epochs), 2 * max_epochs + 1, steps)
    assert "".join(whole).count("0") == max_epochs * steps
    assert whole[-2:] == ["1" * steps] * 2


def test_the_rules_can_be_chosen() -> None:
    rules = HAMUQ(1e-3), GradAscent()
    schedule = Alternate(1, forget=rules[0], retain=rules[1])
    assert schedule.rules == rules
    assert (schedule.rule_at(0, 0), schedule.rule_at(1, 0)) == rules


class Stubborn(GradAscent):
    """Remembers its steps."""

    def state_dict(self) -> dict[str, object]:
        return {"steps": 1}


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "no max-epoch": ({"max_epochs": 0}, "Expected `max_epochs` to be at least 1, but got 0"),
    "no max-step": ({"max_steps": 0}, "Expected `max_steps` to be at least 1, but got 0"),
    "never forgets": ({"forget": FineTune()}, "Expected `forget` to be a rule that forgets"),
    "no rule": ({"retain": "descent"}, "Expected rules such as GradAscent.* to take turns, but got 'descent'"),
    "other groups": ({"forget": FeasibleDirection({"a": 0.1})}, "Expected all rules to have the same groups"),
    "a target": ({"forget": HAMUQ(TargetQuota(2.0))}, "Expected rules without a target to take turns"),
    "a memory": ({"forget": Stubborn()}, "Expected rules that remember nothing to take turns"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(HAMUValueError, match=message):
        Alternate(**{"max_epochs": 1, **settings})  # type: ignore[arg-type]


def test_schedules_of_ones_own() -> None:
    class Thirds(Schedule):
        rules: tuple[Rule, ...] = (GradAscent(), FineTune())  # type: ignore[assignment]

        def rule_at(self, epoch: int, step: int) -> Rule:
            return self.rules[step % 3 > 0]

    check_schedule(Thirds())
    assert turns(Thirds(), 1, 6) == ["011011"]
