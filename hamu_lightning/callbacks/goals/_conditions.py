"""When unlearning should end by itself, and in which words that is said."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from hamu_lightning.callbacks.goals._signals import Signals
from hamu_lightning.checks import check_count, check_flag, check_number, describe, is_iterable, store
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.wording import count

StopOn: TypeAlias = Literal["collateral_damage", "infeasible", "not_finite"]


class StopReason(str, Enum):
    """Why unlearning ended by itself."""

    TARGET_REACHED = "target reached"
    """The forget loss has come to its target."""
    LANDED_SHORT = "landed short of the target"
    """A step went beyond the target, and the weights before it were nearer: they count, with less than 95 % of it."""
    COLLATERAL_DAMAGE = "collateral damage"
    """No step inside the trust region can give the quota without harm to the retain loss."""
    INFEASIBLE = "infeasible"
    """The trust region does not allow the quota."""
    RETAIN_CEILING = "retain loss above its ceiling"
    """The retain loss rose above what the user allows."""
    FORGET_CEILING = "forget loss above its ceiling"
    """Forgotten too far: an odd loss is as revealing as a low one."""
    PROMISES_BROKEN = "promises broken"
    """Steps break their promise however small the trust region."""
    RETAIN_GUARD = "retain data out of bounds"
    """The retain loss or accuracy leaves what `RetainGuard` allows however small the trust region."""
    NOT_FINITE = "not finite"
    """Step after step was left out for numbers that are not finite."""


CEILINGS = (StopReason.RETAIN_CEILING, StopReason.FORGET_CEILING)


class StopCondition(ABC):
    """A condition to stop on, judged before each step, over the last steps.

    Attributes:
        patience: Over how many steps.
        reason: What it is called.
        needs_bound: Whether it reads `Signals.feasible`, which takes a search at each step.
    """

    patience: int
    reason: StopReason
    needs_bound: ClassVar[bool] = True

    @abstractmethod
    def explain(self, steps: list[Signals]) -> str | None:
        """Tell why to stop, with numbers; None to go on.

        Args:
            steps: The last `patience` steps, the present one at the end.
        """

    def _check(self, **numbers: float) -> None:
        store(self, patience=check_count("patience", self.patience))
        store(self, **{name: check_number(name, value, least=0) for name, value in numbers.items()})


@dataclass(frozen=True)
class CollateralDamage(StopCondition):
    """Stop when no step can give the quota without harm to the other objective, all blocks taken jointly.

    Compares the means of bound and quota over `patience` steps: single batches are noisy
    (docs/method.md#certificates, eq. 6.6).

    Args:
        patience: Over how many steps.
        epsilon: How far the quota may exceed the bound, as a share of the quota.

    Raises:
        HAMUValueError: If an argument is out of its range.
    """

    patience: int = 1
    epsilon: float = 0.0
    reason = StopReason.COLLATERAL_DAMAGE

    def __post_init__(self) -> None:
        """Check the numbers."""
        self._check(epsilon=self.epsilon)

    def explain(self, steps: list[Signals]) -> str | None:
        """Tell whether the bound is too low."""
        feasible, quota = _mean(s.feasible for s in steps), _mean(s.quota for s in steps)
        if not feasible < (1 - self.epsilon) * quota:
            return None
        bound, free = steps[-1].bound, steps[-1].free
        return (
            f"the quota asks for a {bound} improvement of {quota:.4g} per step, but no step inside the trust region "
            f"gives more than {feasible:.4g} without harm to the {free} loss. Lower the quota, enlarge the radius, or "
            "accept the model reached."
        )


@dataclass(frozen=True)
class Infeasible(StopCondition):
    """Stop when the trust region does not allow the quota.

    Args:
        patience: In how many steps in a row.

    Raises:
        HAMUValueError: If it is out of its range.
    """

    patience: int = 1
    reason = StopReason.INFEASIBLE
    needs_bound = False

    def __post_init__(self) -> None:
        """Check the number."""
        self._check()

    def explain(self, steps: list[Signals]) -> str | None:
        """Tell whether each step fell short."""
        if any(s.is_served for s in steps):
            return None
        last = steps[-1]
        return (
            f"the quota asks for a {last.bound} improvement of {last.quota:.4g} per step, but the trust region allows "
            f"{last.given:.4g}. Lower the quota or enlarge the radius."
        )


@dataclass(frozen=True)
class _Ceiling(StopCondition):
    """Stop when a loss is above a ceiling, and go back to the weights from before."""

    loss: float
    patience: int = 5
    by_objective: bool = False
    objective: ClassVar[str]

    def __post_init__(self) -> None:
        """Check the numbers."""
        store(self, by_objective=check_flag("by_objective", self.by_objective))
        self._check(loss=self.loss)

    def explain(self, steps: list[Signals]) -> str | None:
        """Tell whether the mean over the last steps is above."""
        mean = _mean(getattr(s, f"{self.objective}_loss") for s in steps)
        if not mean > self.loss:
            return None
        return f"the {self.objective} loss is {mean:.4g} on training batches, its ceiling {self.loss:.4g}."


@dataclass(frozen=True)
class RetainAbove(_Ceiling):
    """Stop when the retain loss is above a ceiling, and take the steps back that led there.

    Args:
        loss: The ceiling, in the unit of the loss.
        patience: Over how many steps the loss of the batches is averaged.
        by_objective: Where an objective takes the place of the loss: whether the ceiling is for that, in its unit. Else
            the module's own loss of the same batches is measured beside it, in evaluation mode.

    Raises:
        HAMUValueError: If an argument is out of its range.
    """

    objective = "retain"
    reason = StopReason.RETAIN_CEILING


@dataclass(frozen=True)
class ForgetAbove(_Ceiling):
    """Stop when the forget loss is above a ceiling: forgotten too far is as revealing as remembered.

    Args:
        loss: The ceiling, in the unit of the loss.
        patience: Over how many steps the loss of the batches is averaged.
        by_objective: Where an objective takes the place of the loss: whether the ceiling is for that, in its unit. Else
            the module's own loss of the same batches is measured beside it, in evaluation mode.

    Raises:
        HAMUValueError: If an argument is out of its range.
    """

    objective = "forget"
    reason = StopReason.FORGET_CEILING


@dataclass(frozen=True)
class NotFinite(StopCondition):
    """Stop when steps are left out one after the other, for numbers that are not finite.

    Args:
        patience: How many in a row.

    Raises:
        HAMUValueError: If it is out of its range.
    """

    patience: int = 10
    reason = StopReason.NOT_FINITE
    needs_bound = False

    def __post_init__(self) -> None:
        """Check the number."""
        self._check()

    def explain(self, steps: list[Signals]) -> str | None:
        """Tell whether all were left out."""
        if any(s.is_finite for s in steps):
            return None
        return (
            f"the last {count(len(steps), 'step')} had gradients that are not finite. Check the data and the loss, or "
            "lower the learning rate."
        )


def as_conditions(stop_on: Iterable[StopOn | StopCondition]) -> tuple[StopCondition, ...]:
    """Return the conditions that a user named or made.

    Raises:
        HAMUValueError: If something is neither.
    """
    named = {"collateral_damage": CollateralDamage, "infeasible": Infeasible, "not_finite": NotFinite}
    given: list[Any] = list(stop_on) if is_iterable(stop_on) else [stop_on]
    conditions = [named[c]() if isinstance(c, str) and c in named else c for c in given]
    unknown = [c for c in conditions if not isinstance(c, StopCondition)]
    if unknown:
        raise HAMUValueError(
            f"Expected `stop_on` to hold some of {get_args(StopOn)} or conditions such as RetainAbove(0.4), "
            f"but got {', '.join(map(describe, unknown))}."
        )
    found = tuple(c for c in conditions if isinstance(c, StopCondition))
    for kind in (RetainAbove, ForgetAbove):
        if len({c.by_objective for c in found if isinstance(c, kind)}) > 1:
            raise HAMUValueError(
                f"Expected ceilings of one unit, but got {kind.__name__} both with and without by_objective=True. "
                "Leave out one of them."
            )
    return found


def look_at_loss(conditions: Iterable[StopCondition], objective: str) -> bool:
    """Whether one of these is a ceiling for the module's own loss on "retain" or "forget" batches, whatever is raised.

    Example:
        >>> look_at_loss([RetainAbove(1.0)], "retain"), look_at_loss([ForgetAbove(1.0, by_objective=True)], "forget")
        (True, False)
    """
    return any(isinstance(c, _Ceiling) and c.objective == objective and not c.by_objective for c in conditions)


def _mean(numbers: Iterable[float]) -> float:
    values = list(numbers)
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan
