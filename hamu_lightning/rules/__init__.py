"""Rules: from the Gramians of the retain and the forget gradient to the step of each block."""

from hamu_lightning.rules._adapters import Adapter, check_adapters, find_adapters, pair_adapters
from hamu_lightning.rules._base import Rule, as_wide, check_gramian
from hamu_lightning.rules._coefficients import Branch, Coefficients
from hamu_lightning.rules._combination import CombinationRule
from hamu_lightning.rules._descent import descend, descent_gramian, join_blocks
from hamu_lightning.rules._grad_ascent import GradAscent
from hamu_lightning.rules._grad_diff import GradDiff
from hamu_lightning.rules._gru import GRU
from hamu_lightning.rules._hamu import HAMUQ, HAMUU, FineTune, OnInfeasible
from hamu_lightning.rules._mgda import MGDA
from hamu_lightning.rules._munba import MUNBa
from hamu_lightning.rules._ngdiff import NGDiff
from hamu_lightning.rules._pcgrad import PCGrad
from hamu_lightning.rules._quota import AbsoluteQuota, Quota, RelativeQuota, TargetQuota, as_quota, check_quota
from hamu_lightning.rules._radius import (
    AdapterRadius,
    FixedRadius,
    LearningRateRadius,
    Radius,
    RelativeRadius,
    ScaledRadius,
    WeightLayout,
    check_radius,
)
from hamu_lightning.rules._schedule import Alternate, Schedule, check_schedule

__all__ = [
    "HAMUQ",
    "HAMUU",
    "AbsoluteQuota",
    "Adapter",
    "AdapterRadius",
    "Alternate",
    "Branch",
    "Coefficients",
    "CombinationRule",
    "FineTune",
    "FixedRadius",
    "GRU",
    "GradAscent",
    "GradDiff",
    "LearningRateRadius",
    "MGDA",
    "MUNBa",
    "NGDiff",
    "PCGrad",
    "Quota",
    "Radius",
    "RelativeQuota",
    "RelativeRadius",
    "Rule",
    "Schedule",
    "TargetQuota",
    "OnInfeasible",
    "ScaledRadius",
    "WeightLayout",
    "as_quota",
    "as_wide",
    "check_adapters",
    "check_gramian",
    "check_quota",
    "check_radius",
    "check_schedule",
    "descend",
    "descent_gramian",
    "find_adapters",
    "join_blocks",
    "pair_adapters",
]
