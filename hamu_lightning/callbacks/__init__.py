"""Lightning: the callback, and the split of a dataset into what is retained and what is forgotten."""

from hamu_lightning.callbacks._checks import HAMUMisconfigurationError
from hamu_lightning.callbacks._hamu_callback import HAMUCallback
from hamu_lightning.callbacks._preflight import preflight
from hamu_lightning.callbacks._preflight_report import PreflightReport
from hamu_lightning.callbacks._saliency import compute_saliency_mask
from hamu_lightning.callbacks._stopping import (
    CollateralDamage,
    ForgetAbove,
    Infeasible,
    NotFinite,
    RetainAbove,
    StopCondition,
    StopReason,
)
from hamu_lightning.callbacks._streams import split_forget
from hamu_lightning.callbacks._targets import Chance, Holdout, Target
from hamu_lightning.callbacks._verification import VerifySteps

__all__ = [
    "Chance",
    "CollateralDamage",
    "ForgetAbove",
    "HAMUCallback",
    "HAMUMisconfigurationError",
    "Holdout",
    "Infeasible",
    "NotFinite",
    "PreflightReport",
    "RetainAbove",
    "StopCondition",
    "StopReason",
    "Target",
    "VerifySteps",
    "compute_saliency_mask",
    "preflight",
    "split_forget",
]
