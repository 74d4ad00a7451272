"""Rules that need a solver or another package: many groups, and TorchJD's weightings. They read the host once per step."""

from hamu_lightning.solvers._ball import QPSolution, SolveStatus
from hamu_lightning.solvers._result import GroupCoefficients
from hamu_lightning.solvers._rule import FeasibleDirection
from hamu_lightning.solvers._torchjd import FromTorchJD

__all__ = ["FeasibleDirection", "FromTorchJD", "GroupCoefficients", "QPSolution", "SolveStatus"]
