"""Schedules: rules that take turns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from hamu_lightning.checks import check_count, check_optional, describe, store
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.rules._base import Rule
from hamu_lightning.rules._grad_ascent import GradAscent
from hamu_lightning.rules._hamu import FineTune


class Schedule(ABC):
    """Says which rule makes each step. A function of the position alone: it remembers nothing."""

    @property
    @abstractmethod
    def rules(self) -> tuple[Rule, ...]:
        """The rules that take turns; the one of the first step comes first."""

    @abstractmethod
    def rule_at(self, epoch: int, step: int) -> Rule:
        """Return the rule of a step, one of `rules`.

        Args:
            epoch: Epochs since unlearning began, from 0.
            step: Optimizer steps since the epoch began, from 0.
        """


@dataclass(frozen=True)
class Alternate(Schedule):
    """Forgetting and repair by turns, then repair alone: the alternation of SCRUB (Kurmanji et al. 2023, Algorithm 1).

    SCRUB takes *max-steps*, ascent on the forget objective, and *min-steps*, descent on the retain objective, never
    both at once. Max-steps belong to the first epochs only; the last ones repair what they did:

        max-step    d = +lr g_f
        min-step    d = -lr g_r

    With `max_steps`, each of the first `max_epochs` epochs begins with so many max-steps, and the rest of the epoch are
    min-steps. In the paper they are one pass over the forget set: `max_steps=len(forget_loader)`. Without, whole epochs
    take turns, a max-epoch first, until there have been `max_epochs` of them.

    A divergence from the original model, such as SCRUB's, has no gradient at that model: the max-steps before the first
    min-step hardly move the weights.

    Args:
        max_epochs: The number of epochs with max-steps, at least 1.
        max_steps: How many max-steps each of them begins with; None for all of its steps.
        forget: The rule of a max-step.
        retain: The rule of a min-step. `FineTune` needs no forget pass, and there is none.

    Raises:
        HAMUValueError: If an argument is out of its range, or the two rules do not go together.

    Example:
        >>> schedule = Alternate(max_epochs=2, max_steps=1)
        >>> [type(schedule.rule_at(epoch, step)).__name__ for epoch in range(3) for step in range(2)]
        ['GradAscent', 'FineTune', 'GradAscent', 'FineTune', 'FineTune', 'FineTune']
    """

    max_epochs: int
    max_steps: int | None = None
    forget: Rule = GradAscent()
    retain: Rule = FineTune()

    def __post_init__(self) -> None:
        """Check the settings."""
        max_steps = check_optional(check_count, "max_steps", self.max_steps)
        store(self, max_epochs=check_count("max_epochs", self.max_epochs), max_steps=max_steps)
        if isinstance(self.forget, Rule) and self.forget.is_plain:
            raise HAMUValueError(
                f"Expected `forget` to be a rule that forgets, but got {describe(self.forget)}, a plain step on the "
                "retain data. Use GradAscent(), or a rule for both such as HAMUQ(quota=1e-3)."
            )
        check_schedule(self)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The two rules."""
        return self.forget, self.retain

    def rule_at(self, epoch: int, step: int) -> Rule:
        """Return the rule of a step; see `Schedule.rule_at`."""
        if self.max_steps is None:
            is_max = epoch % 2 == 0 and epoch < 2 * self.max_epochs
        else:
            is_max = epoch < self.max_epochs and step < self.max_steps
        return self.forget if is_max else self.retain


def check_schedule(schedule: Schedule) -> None:
    """Raise unless the rules of a schedule can take turns on the same data; for the constructor of a new schedule.

    Args:
        schedule: The schedule, ready to be asked for its rules.

    Raises:
        HAMUValueError: If one is no rule, has other groups than the first, follows a target, or remembers its steps.
    """
    first = schedule.rules[0]
    for rule in schedule.rules:
        if not isinstance(rule, Rule):
            raise HAMUValueError(f"Expected rules such as GradAscent() to take turns, but got {describe(rule)}.")
        if rule.groups != first.groups:
            raise HAMUValueError(
                f"Expected all rules to have the same groups, but {describe(first)} has {first.groups} and "
                f"{describe(rule)} has {rule.groups}. Let rules for two gradients take turns, or rules for the same "
                "requests."
            )
        if rule.target_quotas:
            raise HAMUValueError(
                f"Expected rules without a target to take turns, but got {describe(rule)}. A target is followed step "
                "by step: give its rule alone, HAMUCallback(rule=...), or a quota in loss units per step."
            )
        if rule.state_dict():
            raise HAMUValueError(
                f"Expected rules that remember nothing to take turns, but {describe(rule)} keeps state from step to "
                "step. Give it alone, HAMUCallback(rule=...)."
            )
