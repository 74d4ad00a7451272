"""Many problems, one call of the solver per round."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

from hamu_lightning.solvers._backend import Backend
from hamu_lightning.solvers._projection import Projected, Projection

T = TypeVar("T")


def run_searches(
    searches: Sequence[Generator[Projection, Projected | None, T]], backend: Backend, *, together: bool = True
) -> list[T]:
    """Run searches until each has returned; what they ask in one round goes to the solver as one sparse problem.

    Args:
        searches: They ask for projections, and are sent the answers.
        backend: Who answers.
        together: False asks one question at a time.

    Returns:
        What the searches returned.
    """
    results: dict[int, T] = {}
    answers: dict[int, Projected | None] = dict.fromkeys(range(len(searches)))
    while answers:
        questions: dict[int, Projection] = {}
        for index, answer in answers.items():
            try:
                questions[index] = searches[index].send(answer)
            except StopIteration as end:
                results[index] = end.value
        groups = [list(questions)] if together else [[index] for index in questions]
        answers = {}
        for group in filter(None, groups):
            answers.update(zip(group, backend.project([questions[index] for index in group]), strict=True))
    return [results[index] for index in range(len(searches))]
