"""torchmetrics classes: both objectives, the hardness of their conflict, membership, distances to retrained models."""

from hamu_lightning.metrics._hardness import Hardness, HardnessValue
from hamu_lightning.metrics._lira import LiRA
from hamu_lightning.metrics._membership import Interval, MembershipAUC
from hamu_lightning.metrics._pools import KLOM, ULiRA
from hamu_lightning.metrics._references import (
    ZRF,
    ActivationDistance,
    Agreement,
    JSToReference,
    KLToReference,
    KSOfLosses,
    LogOddsDistance,
)
from hamu_lightning.metrics._running_objective import Objective, RunningObjective
from hamu_lightning.metrics._texts import ExactMemorization, ExtractionStrength, MinK, PrivLeak, TruthRatio
from hamu_lightning.metrics.functional import Estimate

__all__ = [
    "KLOM",
    "ZRF",
    "ActivationDistance",
    "Agreement",
    "Estimate",
    "ExactMemorization",
    "ExtractionStrength",
    "Hardness",
    "HardnessValue",
    "Interval",
    "JSToReference",
    "KLToReference",
    "KSOfLosses",
    "LiRA",
    "LogOddsDistance",
    "MembershipAUC",
    "MinK",
    "Objective",
    "PrivLeak",
    "RunningObjective",
    "TruthRatio",
    "ULiRA",
]
