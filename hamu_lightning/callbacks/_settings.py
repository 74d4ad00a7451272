"""What the user asked for: the arguments of HAMUCallback, checked, and those that belong together as objects."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeAlias, TypedDict, get_args

from torch import Tensor, nn

from hamu_lightning.callbacks._consistency import (
    check_alone,
    check_brought,
    check_confirm,
    check_group_names,
    check_objectives,
    check_sources,
)
from hamu_lightning.callbacks._refusal import HAMUMisconfigurationError
from hamu_lightning.callbacks.goals import Confirm, RetainGuard, StopCondition, VerifySteps, as_target
from hamu_lightning.callbacks.passes import HoldsData, name_sources
from hamu_lightning.checks import (
    check_choice,
    check_count,
    check_flag,
    check_optional,
    check_seed,
    check_type,
    describe,
    store,
)
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives import Objective
from hamu_lightning.rules import (
    HAMUQ,
    AdapterRadius,
    Quota,
    RelativeRadius,
    Rule,
    Schedule,
    TargetQuota,
    find_adapters,
)
from hamu_lightning.solvers import FeasibleDirection

# Chosen in docs/targets.md: one problem for the whole model, whose weights a step moves by this share at most; with
# low-rank adapters the weights that they change.
_TARGET_RADIUS = 2e-3
_ADAPTER_RADIUS = 5e-2
# Where a check has to pass, the steps aim ever further while it fails: what they ask for leaves more room to spare the
# retain data (docs/language_models.md).
_CHECKED_SHARE = 0.5
BatchNormMode: TypeAlias = Literal["freeze", "retain"]


@dataclass(frozen=True)
class PassOptions:
    """Which passes a fit makes besides those on the retain data, and how.

    Args:
        batch_size: Batch size of the forget stream where `forget` is a Dataset. Default: that of the training loader;
            with a target the whole Dataset, or equal parts of it of up to 256 samples.
        batchnorm: "freeze" keeps all BatchNorm layers in evaluation mode in both passes, as in the paper; "retain"
            updates their statistics from the retain stream only.
        every_n_steps: Combine at every n-th optimizer step; the steps between are plain steps on the retain data.
        groups_per_step: So many of the groups other than retain run in each step, one after the other; the others take
            part with their last gradients (the first step takes all). Saves passes, costs one gradient of memory.

    Raises:
        HAMUValueError: If an argument is out of its range.

    Example:
        >>> PassOptions(batch_size=32).every_n_steps
        1
    """

    batch_size: int | None = None
    batchnorm: BatchNormMode = "freeze"
    every_n_steps: int = 1
    groups_per_step: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("batchnorm", self.batchnorm, get_args(BatchNormMode))
        store(
            self,
            batch_size=check_optional(check_count, "batch_size", self.batch_size),
            every_n_steps=check_count("every_n_steps", self.every_n_steps),
            groups_per_step=check_optional(check_count, "groups_per_step", self.groups_per_step),
        )


@dataclass(frozen=True)
class StepOptions:
    """How the optimizer takes the combined steps: the options of `HAMUOptimizer`, in which the callback wraps it.

    Args:
        exact: For an optimizer that is not plain SGD: apply the rule's step itself. Momentum, weight decay and Adam's
            scaling then do not act. Default: with `target`, and not else.
        track_actual: Log `hamu/actual_retain_improvement` and `hamu/actual_forget_improvement`, what the weights'
            actual change did to first order.
        sketch: Keep projections of so many numbers in place of the groups' gradients, for memory: each group then runs
            twice per step.
        mask: For names of the module's parameters a bool tensor each, True where a weight may move, such as
            `compute_saliency_mask(module, forget_loader)`.

    Raises:
        HAMUValueError: If an argument is out of its range.

    Example:
        >>> StepOptions(exact=True).track_actual
        False
    """

    exact: bool | None = None
    track_actual: bool = False
    sketch: int | None = None
    mask: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the options."""
        store(
            self,
            exact=check_optional(check_flag, "exact", self.exact),
            track_actual=check_flag("track_actual", self.track_actual),
            sketch=check_optional(check_count, "sketch", self.sketch),
        )
        check_type("mask", self.mask, Mapping | None, "a dict of bool tensors by the names of weights")


class DeprecatedOptions(TypedDict, total=False):
    """What `HAMUCallback` took directly before there were `PassOptions` and `StepOptions`."""

    batch_size: int | None
    batchnorm: BatchNormMode
    every_n_steps: int
    groups_per_step: int | None
    exact: bool
    track_actual: bool
    sketch: int | None
    mask: Mapping[str, Tensor] | None


# From this date on, and from this version on, the deprecated options are gone.
DEPRECATED_UNTIL = "2027-06-01"
DEPRECATED_UNTIL_VERSION = "0.4"


def take_deprecated(
    passes: PassOptions, steps: StepOptions, deprecated: Mapping[str, Any]
) -> tuple[PassOptions, StepOptions]:
    """Put options that were given by their old place into the new one, with a warning.

    Raises:
        TypeError: If a name is none of them.
        HAMUValueError: If an option is given in both ways.
    """
    check_type("passes", passes, PassOptions, "PassOptions(...)")
    check_type("steps", steps, StepOptions, "StepOptions(...)")
    given: dict[str, Any] = {"passes": passes, "steps": steps}
    homes = {f.name: home for home, options in given.items() for f in fields(options)}
    options = dict(given)
    for name, value in deprecated.items():
        if name not in homes:
            raise TypeError(f"HAMUCallback.__init__() got an unexpected keyword argument {name!r}")
        home, kind = homes[name], type(given[homes[name]])
        if given[home] != kind():
            raise HAMUValueError(
                f"Expected `{name}` inside of `{home}`, but got both `{home}` and `{name}`. "
                f"Write {home}={kind.__name__}({name}=...)."
            )
        warnings.warn(
            f"`HAMUCallback({name}=...)` is deprecated and goes with version {DEPRECATED_UNTIL_VERSION}, not before "
            f"{DEPRECATED_UNTIL}: write `{home}={kind.__name__}({name}=...)`, from hamu_lightning.callbacks.",
            FutureWarning,
            stacklevel=3,  # who calls HAMUCallback
        )
        options[home] = replace(options[home], **{name: value})
    return options["passes"], options["steps"]


@dataclass(frozen=True)
class FitSettings(HoldsData):
    """The arguments of HAMUCallback, as it uses them. Pickles hold a description in the place of the data.

    Raises:
        HAMUMisconfigurationError: If the rule and the data have different groups.
        HAMUValueError: If an objective makes no sense on its stream.
    """

    forget: Any
    protect: Mapping[str, Any]
    rule: Rule | None
    schedule: Schedule | None
    objective: Objective | None
    retain_objective: Objective | None
    stop_on: tuple[StopCondition, ...]
    verify: VerifySteps | None
    guard: RetainGuard | None
    passes: PassOptions
    steps: StepOptions
    preflight: bool
    progress_bar: bool
    seed: int
    has_target: bool = False
    confirm: Any = field(default=None, repr=False)
    _data: ClassVar[tuple[str, ...]] = ("forget", "protect", "confirm")

    def __post_init__(self) -> None:
        """Check them, and what depends on several of them."""
        store(
            self,
            preflight=check_flag("preflight", self.preflight),
            progress_bar=check_flag("progress_bar", self.progress_bar),
            seed=check_seed(self.seed),
        )
        store(self, protect=dict(check_type("protect", self.protect, Mapping, "a dict of loaders by name")))
        check_sources("forget", self.forget)
        check_sources("protect", self.protect)
        check_group_names((*(() if self.rule is None else self.rule.groups), *self.protect))
        if self.rule is not None and (self.protect or isinstance(self.forget, Mapping)):
            name_sources(self.rule, self.forget, self.protect)
        check_objectives(self.objective, self.retain_objective)
        if self.rule is not None:
            check_brought(self.objective, self.rule)
        check_confirm(self.confirm, () if self.rule is None else self.rule.target_quotas)

    def confirm_of(self, group: str) -> Confirm | None:
        """The check before the target of a group counts as reached; None for none."""
        found: Confirm | None = self.confirm.get(group) if isinstance(self.confirm, Mapping) else self.confirm
        return found

    def objective_of(self, group: str, rule: Rule) -> Objective | None:
        """What is raised on a group: what its target brings, or what the user chose; None for the module's own loss."""
        quota = rule.target_quotas.get(group)
        brought: Objective | None = getattr(getattr(quota, "target", None), "objective", None)
        return self.objective if brought is None else brought

    def for_module(self, module: nn.Module) -> FitSettings:
        """The same with the radius that a default rule has for a module: another one where adapters are trained."""
        if not self.has_target or not isinstance(self.rule, HAMUQ | FeasibleDirection):
            return self
        trained = {id(p) for p in module.parameters() if p.requires_grad}
        has_adapters = any(id(f) in trained for a in find_adapters(module) for f in (a.down, a.up))
        radius = AdapterRadius(_ADAPTER_RADIUS) if has_adapters else RelativeRadius(_TARGET_RADIUS)
        return self if self.rule.radius == radius else replace(self, rule=replace(self.rule, radius=radius))

    def with_request(self, name: str, forget: Any, quota: float | Quota | None, target: Any) -> FitSettings:
        """The same with one more request to forget; see `HAMUCallback.add_request`."""
        rule, is_fixed = self.rule, self.schedule is not None
        if is_fixed or not isinstance(rule, FeasibleDirection) or not isinstance(self.forget, Mapping):
            raise HAMUMisconfigurationError(
                "Expected named requests and a rule for several groups, HAMUCallback({name: loader}, "
                f"FeasibleDirection({{name: quota}})), to add a request to, but got {describe(self.schedule or rule)}."
            )
        if name in rule.groups:
            raise HAMUValueError(f"Expected a new name for the request, but {name!r} is one of {rule.groups}.")
        if (quota is None) == (target is None):
            raise HAMUValueError(f"Expected either `quota` or `target` for the request {name!r}, but got both or none.")
        asked = TargetQuota(as_target(target)) if quota is None else quota
        return replace(
            self, forget={**self.forget, name: forget}, rule=replace(rule, quota={**rule.quota, name: asked})
        )


def choose_rule(
    rule: Any, target: Any, schedule: Any, every_n_steps: int, protect: Iterable[str] = (), confirm: Any = None
) -> Rule | None:
    """Return the rule that a fit begins with: the user's, the one that leads to a target, or the schedule's first.

    Raises:
        HAMUValueError: If more than one of them is given, or something else.
    """
    if schedule is not None:
        check_alone(schedule, rule=rule, target=target, every_n_steps=None if every_n_steps == 1 else every_n_steps)
        rule = schedule.rule_at(0, 0)
    if target is not None:
        if rule is not None:
            raise HAMUValueError(
                "Expected `target` or `rule`, but got both. With a rule of your own: "
                "HAMUQ(quota=TargetQuota(target), radius=...)."
            )
        rule = lead_to(target, protect, confirm)
    chosen: Rule | None = check_type("rule", rule, Rule | None, "a rule such as HAMUQ(quota=1e-3)")
    return chosen


def lead_to(target: Any, protect: Iterable[str], confirm: Any) -> Rule:
    """The rule that leads to a target, or to one for each request by name, and lets no protected group get worse."""
    radius = RelativeRadius(_TARGET_RADIUS)
    if not isinstance(target, Mapping):
        return HAMUQ(ask_for(target, confirm), radius=radius, blocks="global")
    checks = confirm if isinstance(confirm, Mapping) else {}
    quotas = {name: ask_for(one, checks.get(name)) for name, one in target.items()}
    return FeasibleDirection(quotas, dict.fromkeys(protect, 0.0), radius=radius)


def ask_for(target: Any, confirm: Any) -> TargetQuota:
    """What the steps towards a target are asked for."""
    quota = TargetQuota(as_target(target))
    return quota if confirm is None else replace(quota, share=_CHECKED_SHARE)


def choose_verification(verify: Any, *, has_target: bool) -> VerifySteps | None:
    """Return how steps are verified: as the user says, and by default where there is a target."""
    if verify is None:
        verify = has_target
    if isinstance(verify, VerifySteps):
        return verify
    check_type("verify", verify, bool, "VerifySteps(...), True or False")
    return VerifySteps() if verify else None
