"""In how many steps a target should be reached."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks._refusal import HAMUMisconfigurationError
from hamu_lightning.rules import TargetQuota

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# A target is approached over this share of the steps; the rest is left to settle.
_APPROACH = 2 / 3


def plan_steps(trainer: Trainer, quota: TargetQuota, taken: int, every_n_steps: int) -> int:
    """In how many combined steps the target should be reached."""
    left = _compat.count_steps_left(trainer) / every_n_steps
    if quota.steps is not None:
        if quota.steps > taken + left:
            rank_zero_warn(
                f"The target should be reached in {quota.steps} combined steps, but the fit has only "
                f"{taken + math.floor(left)}: it will end too early. Set TargetQuota(steps=...) or the Trainer's steps."
            )
        return quota.steps
    if math.isinf(left):
        raise HAMUMisconfigurationError(
            "Expected to know how many steps the fit has, to divide the way to the target among them, but the Trainer "
            "has neither `max_steps` nor `max_epochs`. Set one of them, or TargetQuota(target, steps=...)."
        )
    return math.ceil((taken + left) * _APPROACH)
