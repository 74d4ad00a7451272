"""Rules: from the Gramians of the retain and the forget gradient to the step of each block."""

from hamu_lightning.rules._base import Branch, Coefficients, Rule
from hamu_lightning.rules._hamu import HAMUQ, HAMUU, FineTune
from hamu_lightning.rules._quota import AbsoluteQuota, Quota, RelativeQuota, TargetQuota
from hamu_lightning.rules._radius import FixedRadius, LearningRateRadius, Radius, RelativeRadius

__all__ = [
    "HAMUQ",
    "HAMUU",
    "AbsoluteQuota",
    "Branch",
    "Coefficients",
    "FineTune",
    "FixedRadius",
    "LearningRateRadius",
    "Quota",
    "Radius",
    "RelativeQuota",
    "RelativeRadius",
    "Rule",
    "TargetQuota",
]
