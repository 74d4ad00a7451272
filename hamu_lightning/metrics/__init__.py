"""torchmetrics classes: both objectives, the hardness of their conflict, and membership inference."""

from hamu_lightning.metrics._hardness import Hardness, HardnessValue
from hamu_lightning.metrics._membership import Interval, MembershipAUC
from hamu_lightning.metrics._running_objective import Objective, RunningObjective

__all__ = ["Hardness", "HardnessValue", "Interval", "MembershipAUC", "Objective", "RunningObjective"]
