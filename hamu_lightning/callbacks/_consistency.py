"""Whether the arguments of HAMUCallback can be what they are, and go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hamu_lightning.callbacks import _compat_loaders
from hamu_lightning.callbacks.passes import check_can_be_read
from hamu_lightning.checks import check_type, describe
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives import Objective
from hamu_lightning.rules import Rule, Schedule, check_schedule


def check_alone(schedule: Any, **others: Any) -> None:
    """Raise unless a schedule can be used, and nothing is given that it decides."""
    check_type("schedule", schedule, Schedule, "a schedule such as Alternate(max_epochs=3)")
    check_schedule(schedule)
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise HAMUValueError(
            f"Expected `schedule` without `{given[0]}`, but got both: the schedule says which rule makes each step. "
            "Give rules to it, Alternate(max_epochs=3, forget=..., retain=...)."
        )


def check_sources(name: str, sources: object) -> None:
    """Raise unless something, or all that it maps names to, can be data."""
    for source in sources.values() if isinstance(sources, Mapping) else [sources]:
        if source is not None:
            check_can_be_read(name, _compat_loaders.without_indices(source))


# What modules log begins with these, and what we log of a group with its name.
_RESERVED = ("train", "training", "val", "valid", "validation", "test", "predict", "hamu")


def check_group_names(names: Iterable[str]) -> None:
    """Raise where a group has a name under which modules log their own values."""
    found = [name for name in names if name in _RESERVED]
    if found:
        raise HAMUValueError(
            f"Expected a name for each group that nobody logs by, but got {found[0]!r}: '{found[0]}/loss' is what many "
            f"modules log. Choose another one, such as 'request-1'; reserved are {', '.join(_RESERVED)}."
        )


def check_brought(objective: Objective | None, rule: Rule) -> None:
    """Raise where a target brings what is raised, and something else is to be raised, or another group has it too."""
    targets = [quota.target for quota in rule.target_quotas.values()]
    brought = [target for target in targets if getattr(target, "objective", None) is not None]
    if brought and objective is not None:
        raise HAMUValueError(
            f"Expected {brought[0]} without `objective`, but got {type(objective).__name__}: this target says itself "
            "what is raised. Leave `objective` out, or give another target, such as Holdout(loader)."
        )
    if len({id(target) for target in brought}) < len(brought):
        raise HAMUValueError(
            f"Expected a target of its own for each group, but got one {brought[0]} for several: each learns from its "
            "own samples. Write Unseen(...) once for each group."
        )


def check_confirm(confirm: Any, groups: Iterable[str]) -> None:
    """Raise unless there is a target for each check before one counts as reached.

    Raises:
        HAMUValueError: Otherwise.
    """
    names = [*groups]
    checks = confirm if isinstance(confirm, Mapping) else dict.fromkeys(names or [""], confirm)
    for name, check in checks.items():
        if check is not None and (not callable(check) or isinstance(check, type)):
            raise HAMUValueError(
                "Expected `confirm` to be a function of the module, such as SpansGone(part), that says in words what "
                f"speaks against a target, but got {describe(check)}."
            )
        if check is not None and name not in names:
            of = f" of {name!r}" if name else ""
            raise HAMUValueError(
                f"Expected a target with `confirm`{of}, before which it is asked, but there is none. Give `target`."
            )


def check_objectives(objective: object, retain_objective: object) -> None:
    """Raise unless both are objectives, or None, that make sense on their streams."""
    for name, value in (("objective", objective), ("retain_objective", retain_objective)):
        check_type(name, value, Objective | None, "one of hamu_lightning.objectives, such as NPO(beta=0.1)")
    if isinstance(retain_objective, Objective) and retain_objective.is_forget_only:
        raise HAMUValueError(
            "Expected `retain_objective` to be something to lower on the retain data, but got "
            f"{type(retain_objective).__name__}, which is to be raised on the forget data. Give it to `objective`."
        )
