"""Rules that need a solver from another package; they read the host once per step."""

from hamu_lightning.solvers._torchjd import FromTorchJD

__all__ = ["FromTorchJD"]
