"""Several requests to forget and several groups to protect: the quadratic program, and the rule built on it."""

from hamu_lightning.solvers._ball import QPSolution, SolveStatus
from hamu_lightning.solvers._result import GroupCoefficients
from hamu_lightning.solvers._rule import FeasibleDirection

__all__ = ["FeasibleDirection", "GroupCoefficients", "QPSolution", "SolveStatus"]
