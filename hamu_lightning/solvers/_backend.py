"""The QP solvers of qpsolvers: they guess active sets, one problem or many at a time."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import qpsolvers
from scipy import sparse

from hamu_lightning.checks import check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.solvers._projection import Array, Projected, Projection, make_exact, project_exactly

# At their default tolerances the solvers cannot tell a small multiplier from none. The names differ between them; a
# backend that is not listed keeps its own settings, since every answer is checked.
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    # No polishing: `make_exact` does it, and OSQP 1.1 prints a line where there is nothing to polish.
    "osqp": {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 4000},
    "clarabel": {"tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "tol_feas": 1e-9},
    "scs": {"eps_abs": 1e-9, "eps_rel": 1e-9},
    # It was seen to run for minutes on a problem of ten numbers.
    "highs": {"time_limit": 1.0},
}


@dataclass(frozen=True)
class Backend:
    """One of the installed solvers of qpsolvers.

    Args:
        name: Its name there.

    Raises:
        HAMUValueError: If it is not installed.
    """

    name: str

    def __post_init__(self) -> None:
        """Look whether it is installed."""
        check_type("solver", self.name, str, "the name of a solver of qpsolvers")
        if self.name not in qpsolvers.available_solvers:
            raise HAMUValueError(
                f"Expected `solver` to be one of the installed ones, {', '.join(qpsolvers.available_solvers)}, but got "
                f"{self.name!r}. `pip install 'qpsolvers[{self.name}]'` installs it if qpsolvers knows it."
            )

    def project(self, questions: Sequence[Projection]) -> list[Projected | None]:
        """Answer several questions with one call of the solver.

        An answer that cannot be proved is sought again by non-negative least squares.

        Returns:
            For each question its answer, or None if there is no such point, or none was found.
        """
        inside = [question.is_target_inside for question in questions]
        guesses = self._guess(
            [question for question, is_inside in zip(questions, inside, strict=True) if not is_inside]
        )
        nothing = [np.zeros(question.bounds.size, dtype=bool) for question in questions]
        return [
            Projected(question.target, none)
            if is_inside
            else make_exact(question, next(guesses)) or project_exactly(question)
            for question, is_inside, none in zip(questions, inside, nothing, strict=True)
        ]

    def _guess(self, questions: Sequence[Projection]) -> Any:
        """The active sets, one after the other."""
        if not questions:
            return iter(())
        point, multipliers = self._solve(questions)
        guesses, column, row = [], 0, 0
        for question in questions:
            size, width = question.bounds.size, question.target.size
            slack = question.rows @ point[column : column + width] - question.bounds / question.scale
            guesses.append(multipliers[row : row + size] > slack)
            column, row = column + width, row + size
        return iter(guesses)

    def _solve(self, questions: Sequence[Projection]) -> tuple[Array, Array]:
        """The solver's points and multipliers, one below the other, in units of each question's scale."""
        linear = np.concatenate([-question.target / question.scale for question in questions])
        limits = np.concatenate([-question.bounds / question.scale for question in questions])
        problem = qpsolvers.Problem(_identity(linear.size), linear, _stack_diagonally(questions), limits)
        with warnings.catch_warnings():
            # "exited with status": the answer is checked anyway.
            warnings.simplefilter("ignore")
            try:
                solution = qpsolvers.solve_problem(problem, self.name, **_SETTINGS.get(self.name, {}))
            except qpsolvers.QPError:
                return np.zeros_like(linear), np.zeros_like(limits)
        point = np.zeros_like(linear) if solution.x is None else np.asarray(solution.x)
        multipliers = np.zeros_like(limits) if solution.z is None else np.asarray(solution.z)
        return np.nan_to_num(point), np.nan_to_num(multipliers)


@lru_cache(maxsize=32)
def _identity(size: int) -> sparse.csc_matrix:
    return sparse.identity(size, format="csc")


def _stack_diagonally(questions: Sequence[Projection]) -> sparse.csc_matrix:
    """The matrix of `-rows x <= -bounds`, with the blocks' rows along its diagonal."""
    heights = [question.bounds.size for question in questions]
    widths = [question.target.size for question in questions]
    starts = np.cumsum([0, *heights])
    data = np.concatenate([-question.rows.T.ravel() for question in questions])
    indices = np.concatenate(
        [np.tile(np.arange(a, a + m), r) for a, m, r in zip(starts[:-1], heights, widths, strict=True)]
    )
    pointers = np.cumsum([0, *np.repeat(heights, widths)])
    return sparse.csc_matrix((data, indices, pointers), shape=(starts[-1], sum(widths)))
