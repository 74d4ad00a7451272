"""torchmetrics classes: both objectives, the hardness of their conflict, and membership inference."""

from hamu_lightning.metrics._running_objective import Objective, RunningObjective

__all__ = ["Objective", "RunningObjective"]
