"""The optimizer wrapper: works in a plain PyTorch loop, with Fabric, and under Lightning."""

from hamu_lightning.optim._hamu_optimizer import HAMUOptimizer
from hamu_lightning.optim._report import StepReport

__all__ = ["HAMUOptimizer", "StepReport"]
