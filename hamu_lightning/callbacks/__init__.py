"""Lightning: the callback, and the split of a dataset into what is retained and what is forgotten."""

from hamu_lightning.callbacks._hamu_callback import HAMUCallback
from hamu_lightning.callbacks._known_data import find_hamu, find_parts
from hamu_lightning.callbacks._refusal import HAMUMisconfigurationError
from hamu_lightning.callbacks._settings import PassOptions, StepOptions
from hamu_lightning.callbacks.forecast import PreflightReport, compute_saliency_mask, preflight
from hamu_lightning.callbacks.goals import (
    ByObjective,
    Chance,
    CollateralDamage,
    ForgetAbove,
    ForgottenSamples,
    Holdout,
    Infeasible,
    NotFinite,
    RetainAbove,
    RetainGuard,
    SecondChoice,
    StopCondition,
    StopReason,
    Target,
    Unseen,
    VerifySteps,
)
from hamu_lightning.callbacks.passes import split_forget

__all__ = [
    "ByObjective",
    "Chance",
    "CollateralDamage",
    "ForgetAbove",
    "ForgottenSamples",
    "HAMUCallback",
    "HAMUMisconfigurationError",
    "Holdout",
    "Infeasible",
    "NotFinite",
    "PassOptions",
    "PreflightReport",
    "RetainAbove",
    "SecondChoice",
    "RetainGuard",
    "StepOptions",
    "StopCondition",
    "StopReason",
    "Target",
    "Unseen",
    "VerifySteps",
    "compute_saliency_mask",
    "find_hamu",
    "find_parts",
    "preflight",
    "split_forget",
]
