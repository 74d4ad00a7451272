"""The step itself: from the gradients in the slots to the weights, and all the state that this needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.optim._aim import Aim
from hamu_lightning.optim._applier import Applier
from hamu_lightning.optim._checks import check_all_present, is_at_rest, is_plain_sgd
from hamu_lightning.optim._counters import Counters
from hamu_lightning.optim._gradients import StepGradients
from hamu_lightning.optim._host import HostGradients, HostPlan, can_move_directly, make_host_plan
from hamu_lightning.optim._layout import Layout, collect_names, make_layout
from hamu_lightning.optim._mask import Mask
from hamu_lightning.optim._report import StepReport
from hamu_lightning.optim._scaling import Unscalings
from hamu_lightning.optim._sketch import Sketch, SketchedGradients, SketchSlot
from hamu_lightning.optim._slots import GradientSlot, SpentGradients, pointed_gradients
from hamu_lightning.optim._trial import Referee, Snapshot, shorten_step_
from hamu_lightning.rules import Adapter, Rule

Plan: TypeAlias = Literal["combine", "retain_only", "drop"]
"""What a step is to do: see `HAMUOptimizer.plan_step`."""


@dataclass
class Engine:
    """Makes the steps of a `HAMUOptimizer`, and holds all that changes.

    LightningOptimizer and Fabric copy the optimizer's `__dict__`: they share this object, which is never rebound.
    """

    base: Optimizer
    rule: Rule
    names: dict[Tensor, str]
    find_names: Callable[[], Iterable[tuple[str, Tensor]]] | None = None
    exact: bool = False
    track_actual: bool = False
    reuse_groups: bool = False
    sketch: Sketch | None = None
    recompute: Callable[[str], object] | None = None
    mask: Mask | None = None
    adapters: tuple[Adapter, ...] = ()
    counters: Counters = field(default_factory=Counters)
    slots: dict[str, GradientSlot] = field(default_factory=dict)
    spent: SpentGradients = field(default_factory=SpentGradients)
    aims: dict[str, Aim] = field(default_factory=dict)
    layout: Layout | None = None
    host_plan: tuple[Layout, HostPlan | None] | None = None
    last_step: StepReport | None = None
    plan: Plan = "combine"
    groups: tuple[str, ...] = ()
    window_shares: tuple[float, float] = (1.0, 1.0)
    approve: Callable[[StepReport], bool] | None = None
    referee: Referee | None = None
    region_limit: float = 1.0
    unscalings: Unscalings = field(default_factory=Unscalings)

    def __post_init__(self) -> None:
        """Make what moves the weights."""
        self.applier = Applier(self.base, self.exact)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is asked by nobody: who decides about the steps belongs to a fit, with its trainer and its loaders."""
        theirs = ("approve", "referee", "recompute", "find_names")
        return {**self.__dict__, **dict.fromkeys(theirs), "host_plan": None}

    @property
    def parameters(self) -> list[Tensor]:
        """All tensors of the base optimizer."""
        return [p for group in self.base.param_groups for p in group["params"]]

    @property
    def is_filled(self) -> bool:
        """Whether a slot holds a gradient of the present step."""
        return any(slot.is_fresh for slot in self.slots.values())

    @property
    def region(self) -> float:
        """What the radius of the rule is multiplied by; with a base other than plain SGD, its step."""
        return self.region_limit if self.referee is None else min(self.referee.region, self.region_limit)

    def find_slot(self, name: str) -> GradientSlot:
        """Return the slot of a group other than retain.

        Raises:
            HAMUValueError: If the rule does not know the group.
        """
        if name not in self.rule.groups[1:]:
            raise HAMUValueError(
                f"Expected one of the rule's groups {self.rule.groups}, but got {name!r}. "
                "Each gradient is kept by `with optimizer.group(name): loss.backward()`."
            )
        if name not in self.slots:
            self.slots[name] = GradientSlot() if self.sketch is None else SketchSlot(self.sketch, self.update_layout)
        return self.slots[name]

    def release_slots(self) -> None:
        """Drop the gradients of the step, or keep them for steps without new ones where groups are reused."""
        for slot in self.slots.values():
            if self.reuse_groups and slot.is_fresh:
                slot.retire(self.window_shares[1])
            elif not self.reuse_groups:
                slot.release()

    def drop_step(self) -> None:
        """Give up a step whose gradients are there already, and count it."""
        self.counters.dropped_steps += self.is_filled
        self.release_slots()

    def find_aim(self, name: str) -> Aim:
        """Return what follows the loss of a group."""
        return self.aims.setdefault(name, Aim())

    def update_layout(self) -> Layout:
        """The layout, made again when the set of trainable tensors has changed."""
        trainable = tuple(p for p in self.parameters if p.requires_grad)
        if self.layout is None or [*map(id, self.layout.parameters)] != [*map(id, trainable)]:
            self._learn_names(trainable)
            self.layout = make_layout(self.base.param_groups, self.names, self.rule.blocks, self.mask, self.adapters)
        if self.host_plan is None or self.host_plan[0] is not self.layout:
            self.host_plan = self.layout, make_host_plan(self.layout)
        return self.layout

    def _learn_names(self, trainable: Sequence[Tensor]) -> None:
        """Look for the names of tensors that were added since the optimizer was made."""
        if any(p not in self.names for p in trainable):
            found = () if self.find_names is None else self.find_names()
            self.names.update(collect_names(self.base.param_groups) | {parameter: name for name, parameter in found})

    def notice_overflow(self) -> None:
        """Drop the gradients of a step that the scaler has ended without calling `step()`."""
        if not self.unscalings.is_over:
            return
        if self.is_filled:
            self.spent.remember(p for p in self.parameters if self.unscalings.is_stale(p.grad))
            self.drop_step()
        self.unscalings.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, the losses that targets need, and what the rule keeps."""
        aims = {name: aim.state_dict() for name, aim in self.aims.items()}
        return {**self.counters.state_dict(), "aims": aims, "rule": self.rule.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.counters.load_state_dict(state_dict)
        for name, state in state_dict.get("aims", {}).items():
            self.find_aim(name).load_state_dict(state)
        self.rule.load_state_dict(state_dict.get("rule", {}))

    def undo_steps(self, number: int, then: dict[str, Any]) -> None:
        """Count so many steps as undone that were applied since `state_dict` returned `then`."""
        self.counters.undone_steps += number
        for name, state in then["aims"].items():
            self.find_aim(name).taken = state["taken"]
        self.rule.load_state_dict(then["rule"])

    @torch.no_grad()
    def step(self) -> None:
        """Do what is planned, and let the gradients go."""
        plan, self.plan = self.plan, "combine"
        self.base._opt_called = True  # type: ignore[attr-defined]  # else schedulers warn when a step is left out
        is_initialisation = plan == "combine" and self._is_initialisation()
        self.counters.calls += not is_initialisation
        if is_initialisation or plan == "retain_only":
            self._step_on_retain()
        elif plan == "combine":
            self._combine_and_step()
        else:
            self.drop_step()
        self.release_slots()
        self.spent.remember(self.parameters)
        self.window_shares, self.groups = (1.0, 1.0), ()

    def _step_on_retain(self) -> None:
        """Take a plain step of the base on what `.grad` holds."""
        optimizer, parameters = self.applier.choose(takes_d=False), self.parameters
        if self.mask is None:
            self.applier.move_(optimizer, None, parameters)
            return
        masked = self.mask.hide_all([p.grad for p in parameters], parameters)
        with pointed_gradients(parameters, masked):
            self.applier.move_(optimizer, self.mask, parameters)

    def _is_initialisation(self) -> bool:
        """Whether this step only makes the base's state: torch's `get_optimizer_state_dict` takes one at lr 0."""
        return not self.is_filled and all(float(group["lr"]) == 0 for group in self.base.param_groups)

    def _combine_and_step(self) -> None:
        gradients = self._gather(self.groups or self.rule.groups, self.update_layout())
        self.counters.steps += 1
        try:
            self._decide_and_step(gradients)
        except BaseException:
            self.counters.undone_steps += 1
            raise

    def _decide_and_step(self, gradients: StepGradients) -> None:
        """Ask the rule, and those who decide about its answer."""
        if not self.rule.is_plain and is_at_rest(self.base.param_groups):
            self.counters.zero_lr_steps += 1
            return
        self.last_step = self._ask_rule(gradients)
        if self.approve is not None and not self.approve(self.last_step):
            self.counters.rejected_steps += 1
            return
        if self.referee is None or self.rule.is_plain or not self.referee.is_due:
            self._take_step(gradients)
        elif not self._take_step_on_trial(gradients, self.referee):
            self.counters.undone_steps += 1
            return
        for name in self.rule.target_quotas:
            if name in gradients.groups:
                self.find_aim(name).advance(self.last_step.improvement(name))

    def _gather(self, groups: tuple[str, ...], layout: Layout) -> StepGradients:
        """The gradients of each group."""
        retain = self.spent.find_new(layout.parameters)
        slots = [self.find_slot(name) for name in groups[1:]]
        is_there = [any(g is not None for g in retain), *(slot.is_filled for slot in slots)]
        # Gradients of earlier steps alone say nothing new.
        check_all_present(groups, is_there if self.is_filled else [is_there[0], *(False for _ in slots)])
        others = [[slot.get(p) for p in layout.parameters] for slot in slots]
        if self.mask is not None:
            retain = self.mask.hide_all(retain, layout.parameters)  # copies: `.grad` is the user's
            for grads in others:
                self.mask.hide_(grads, layout.parameters)
        own, new = self.window_shares
        shares = (own, *(new if slot.is_fresh else slot.share for slot in slots))
        if self.sketch is None:
            return self._keep_apart(StepGradients(groups, [retain, *others], layout, shares))
        kept = [slot.projection for slot in slots if isinstance(slot, SketchSlot) and slot.projection is not None]
        known = self.sketch, kept, self.recompute, self.parameters
        return SketchedGradients(groups, [retain, *others], layout, shares, *known)

    def _keep_apart(self, gradients: StepGradients) -> StepGradients:
        """The gradients, in the form that their step is fastest in."""
        plan = None if self.host_plan is None else self.host_plan[1]
        if plan is None or len(gradients.lists) != 2 or not all(map(plan.takes, gradients.lists)):
            return gradients
        return HostGradients(gradients.groups, gradients.lists, gradients.layout, gradients.shares, plan)

    def _ask_rule(self, gradients: StepGradients) -> StepReport:
        """Ask the rule for the coefficients."""
        rule, layout, groups = self.rule, gradients.layout, gradients.groups
        if self.region != 1 and self.applier.moves_by_d:
            rule = rule.in_region(self.region)
        gramian = self.unscalings.mark_overflow(gradients.gramian())
        known: dict[str, Any] = dict(rule.radius.measure(layout))
        targets = {name: quota for name, quota in rule.target_quotas.items() if name in groups}
        known |= rule.step_arguments(groups, {n: self.find_aim(n).resolve(quota) for n, quota in targets.items()})
        lr = layout.learning_rates(self.base.param_groups)
        return StepReport(
            gramian, rule.coefficients(gramian, lr=lr, **known), lr, layout.labels, self.applier.moves_by_d
        )

    def _take_step_on_trial(self, gradients: StepGradients, referee: Referee) -> bool:
        """Apply the step, and take it back as long as the referee does not accept it; return whether it did at last."""
        before = Snapshot(self.applier.choose(takes_d=True), gradients.layout.parameters)
        try:
            return self._try_until_judged(gradients, referee, before)
        except BaseException:  # an interrupt too: nobody has judged where the weights are now
            before.restore()
            raise

    def _try_until_judged(self, gradients: StepGradients, referee: Referee, before: Snapshot) -> bool:
        while True:
            self._take_step(gradients, before, keeps_last=True)
            assert self.last_step is not None
            if not bool(self.last_step.coefficients.is_finite):
                return True  # it has moved nothing, and is counted: the promise is not to blame
            if not self.applier.moves_by_d or gradients.layout.rounds:
                self.last_step = replace(self.last_step, actual_changes=gradients.measure(before.weights))
            verdict = referee.judge(self.last_step)
            if verdict == "accept":
                referee.region = self.region  # which may have grown beyond the limit
                return True
            before.restore()
            if verdict == "drop":
                return False
            self.last_step = self._ask_rule(gradients)

    def _take_step(self, gradients: StepGradients, before: Snapshot | None = None, *, keeps_last: bool = False) -> None:
        """Let the base apply the last answer of the rule; `before` is there where somebody else needs it as well."""
        parameters = gradients.layout.parameters
        is_shortened = self.region != 1 and not self.applier.moves_by_d and not self.rule.is_plain
        weights = None if before is None else before.weights
        if weights is None and (self.track_actual or is_shortened):
            weights = [p.detach().clone() for p in parameters]
        if not self._has_moved_directly(gradients):
            self._move_by_base(gradients, keeps_last=keeps_last or self.track_actual or self.reuse_groups)
        if weights is not None and is_shortened:
            shorten_step_(parameters, weights, self.region)
        if weights is not None and self.track_actual:
            assert self.last_step is not None
            self.last_step = replace(self.last_step, actual_changes=gradients.measure(weights))

    def _has_moved_directly(self, gradients: StepGradients) -> bool:
        """Add the step to the weights, where that is all that the base would do; return whether it was."""
        assert self.last_step is not None
        if self.rule.is_plain or not isinstance(gradients, HostGradients):
            return False
        if not can_move_directly(self.applier.choose(takes_d=True)):
            return False
        if not gradients.move_(self.last_step.coefficients.values, self.last_step.lr):
            return False
        self._count_finite(self.last_step.coefficients.is_finite)
        return True

    def _move_by_base(self, gradients: StepGradients, *, keeps_last: bool) -> None:
        """Let the base apply the combined gradient."""
        # It is written over the last gradients: they may be needed again to measure, or in later steps.
        combined = self._combine(gradients, keeps_last)
        with pointed_gradients(gradients.layout.parameters, combined):
            self._step_base()

    def _combine(self, gradients: StepGradients, keeps_last: bool) -> list[Tensor | None]:
        """The gradients that make the base apply the coefficients; the report says whether float16 holds them."""
        assert self.last_step is not None
        if self.rule.is_plain:
            return gradients.lists[0]
        step, lr = self.last_step.coefficients, self.last_step.lr
        combined, is_finite = gradients.equivalent(
            step.values, lr, step.is_finite, exact=self.exact, keeps_last=keeps_last
        )
        self.last_step = self.last_step.left_out_unless(is_finite)
        return combined

    def _step_base(self) -> None:
        """Let the base apply the gradients, unless they are not finite; plain SGD then gets zeros and does not move."""
        assert self.last_step is not None
        is_finite = self.last_step.coefficients.is_finite
        optimizer = self.applier.choose(takes_d=not self.rule.is_plain)
        if not self.rule.is_plain:
            self._count_finite(is_finite)
            # Momentum, weight decay and Adam move the weights even with a zero gradient: one flag is read.
            if not is_plain_sgd(optimizer) and not bool(is_finite):
                return
        self.applier.move_(optimizer, self.mask, self.parameters)

    def _count_finite(self, is_finite: Tensor) -> None:
        self.counters.not_finite_steps = self.counters.not_finite_steps + (~is_finite).long()
