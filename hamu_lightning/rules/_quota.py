"""Quotas: how much each step is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hamu_lightning.checks import check_count, check_number, check_optional, store
from hamu_lightning.errors import HAMUValueError

# The last of a gap is closed over this many steps: one batch's loss says too little to close it in a single step.
_SETTLING_STEPS = 4


class Quota(ABC):
    """The total that a step is asked for, loss units per step."""

    @abstractmethod
    def compute(self, capacity: Tensor, given: Tensor | None) -> Tensor:
        """Compute the quota of one step.

        Args:
            capacity: 0-d, the most that a step inside the trust region can give: `sum_b R_b |g_b|`.
            given: 0-d, what was resolved outside the rule and overrides it; None where nothing was.

        Returns:
            0-d, loss units per step.
        """


@dataclass(frozen=True)
class AbsoluteQuota(Quota):
    """The same quota at each step. A float as `quota` means this.

    Args:
        quota: Loss units per step, finite, not negative.

    Raises:
        HAMUValueError: If it is out of its range.

    Example:
        >>> AbsoluteQuota(1e-3).compute(torch.tensor(0.5), None)
        tensor(0.0010)
    """

    quota: float

    def __post_init__(self) -> None:
        """Check the number."""
        store(self, quota=check_quota("quota", self.quota))

    def compute(self, capacity: Tensor, given: Tensor | None) -> Tensor:
        """Return the quota, or what overrides it."""
        return torch.full_like(capacity, self.quota) if given is None else given


@dataclass(frozen=True)
class RelativeQuota(Quota):
    """A share of what the trust region allows: never infeasible, whatever the scale of loss and gradients.

    Under the learning-rate radius the capacity grows with the gradients, and these grow as the model forgets: then the
    loss grows faster and faster, and nothing stops it.

    Args:
        fraction: Share of the capacity `sum_b R_b |g_b|`, in [0, 1].

    Raises:
        HAMUValueError: If it is out of its range.

    Example:
        >>> RelativeQuota(0.1).compute(torch.tensor(0.5), None)
        tensor(0.0500)
    """

    fraction: float

    def __post_init__(self) -> None:
        """Check the number."""
        share = check_number("fraction", self.fraction, least=0, wanted="a share of the capacity, at least 0")
        cure = "No step inside the trust region can give more than the capacity; a larger radius can."
        check_number("fraction", share, most=1, cure=cure)
        store(self, fraction=share)

    def compute(self, capacity: Tensor, given: Tensor | None) -> Tensor:
        """Return the share, or what overrides it."""
        return self.fraction * capacity if given is None else given


@dataclass(frozen=True)
class TargetQuota(Quota):
    """What is left to the target, divided by the steps that are left.

    Nobody knows their quota; they know where the forget loss should end. Each step asks for `(target - level) /
    max(steps left, 4)`, never for more than a share of the capacity: a quota at the very capacity leaves no room to
    spare the other objective. Past the target this is negative: the loss may fall back, and well past it the step is
    plain descent on the retain data. `level` is the forget loss, smoothed over batches; `HAMUOptimizer` keeps it, and
    needs the loss of each forget batch for it (`optimizer.aim.observe`).

    Args:
        target: Where the forget loss should end, in its own unit: a number, or what `HAMUCallback` measures at the
            model, such as `Holdout(loader)`.
        steps: In how many steps; None for two thirds of the fit's, so that the rest is left to settle.
        share: The largest share of the capacity `sum_b R_b |g_b|` that a step is asked for, above 0 and at most 1.

    Raises:
        HAMUValueError: If a number is out of its range.

    Example:
        >>> quota = TargetQuota(2.3, steps=100)
        >>> quota.resolve(torch.tensor(0.3), torch.tensor(2.3), step=0, steps=100)
        tensor(0.0200)
    """

    target: Any
    steps: int | None = None
    share: float = field(default=0.9, kw_only=True)

    def __post_init__(self) -> None:
        """Check the numbers."""
        if isinstance(self.target, type) or not callable(getattr(self.target, "measure", self.target)):
            store(self, target=check_number("target", self.target, wanted="a finite loss"))
        store(
            self,
            steps=check_optional(check_count, "steps", self.steps),
            share=check_number("share", self.share, above=0, most=1, wanted="above 0 and at most 1"),
        )

    def resolve(self, level: Tensor, target: Tensor, *, step: int, steps: int) -> Tensor:
        """Compute what a step asks for before it is capped; pure.

        Args:
            level: 0-d, the present forget loss.
            target: 0-d, where it should end.
            step: How many steps were taken.
            steps: How many it should take in all.

        Returns:
            0-d, loss units per step; negative past the target.
        """
        return (target - level) / max(steps - step, _SETTLING_STEPS)

    def compute(self, capacity: Tensor, given: Tensor | None) -> Tensor:
        """Return what was resolved, capped.

        Raises:
            HAMUValueError: If nothing was.
        """
        if given is None:
            raise HAMUValueError(
                "Expected `quota`, from `TargetQuota.resolve`, but got None: a target needs the forget loss. "
                "HAMUOptimizer gives it by itself; in a direct call of a rule pass `quota=`."
            )
        return torch.minimum(given, self.share * capacity)


def as_quota(quota: float | Quota) -> Quota:
    """Return the quota that a rule's argument means: a number is the same quota at each step.

    Raises:
        HAMUValueError: If the number cannot be a quota.

    Example:
        >>> as_quota(0.01), as_quota(RelativeQuota(0.1))
        (AbsoluteQuota(quota=0.01), RelativeQuota(fraction=0.1))
    """
    return quota if isinstance(quota, Quota) else AbsoluteQuota(quota)


def check_quota(name: str, value: object) -> float:
    """Raise unless a number can be a quota, or a floor; return it as a float.

    Args:
        name: The argument's name, as its caller knows it.
        value: Loss units per step.

    Raises:
        HAMUValueError: If it is negative or not finite.
    """
    return check_number(name, value, least=0, wanted="a finite number, not negative, in loss units per step")
