"""Rules: from the Gramians of the retain and the forget gradient to the step of each block."""

from hamu_lightning.rules._base import Branch, Coefficients, Rule
from hamu_lightning.rules._combination import CombinationRule
from hamu_lightning.rules._grad_ascent import GradAscent
from hamu_lightning.rules._grad_diff import GradDiff
from hamu_lightning.rules._gru import GRU
from hamu_lightning.rules._hamu import HAMUQ, HAMUU, FineTune
from hamu_lightning.rules._mgda import MGDA
from hamu_lightning.rules._munba import MUNBa
from hamu_lightning.rules._ngdiff import NGDiff
from hamu_lightning.rules._pcgrad import PCGrad
from hamu_lightning.rules._quota import AbsoluteQuota, Quota, RelativeQuota, TargetQuota
from hamu_lightning.rules._radius import FixedRadius, LearningRateRadius, Radius, RelativeRadius
from hamu_lightning.rules._schedule import Alternate, Schedule

__all__ = [
    "HAMUQ",
    "HAMUU",
    "AbsoluteQuota",
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
]
