"""Rules that read the host once per step: FeasibleDirection for many groups, and TorchJD's weightings."""

from hamu_lightning.solvers._ball import QPSolution, SolveStatus
from hamu_lightning.solvers._result import GroupCoefficients
from hamu_lightning.solvers._rule import FeasibleDirection
from hamu_lightning.solvers._torchjd import FromTorchJD

__all__ = ["FeasibleDirection", "FromTorchJD", "GroupCoefficients", "QPSolution", "SolveStatus"]
