"""The step itself: from the gradients in the slots to the weights, and all the state that this needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import compute_gramian
from hamu_lightning.optim._aim import Aim
from hamu_lightning.optim._checks import check_all_present, is_at_rest, is_plain_sgd
from hamu_lightning.optim._combine import add_up, combine_
from hamu_lightning.optim._layout import Layout, make_layout
from hamu_lightning.optim._mask import Mask
from hamu_lightning.optim._report import StepReport
from hamu_lightning.optim._scaling import Unscaling
from hamu_lightning.optim._sketch import Sketch, SketchSlot, make_gradients_again
from hamu_lightning.optim._slots import GradientSlot, SpentGradients, pointed_gradients
from hamu_lightning.optim._trial import Referee, Snapshot
from hamu_lightning.rules import Rule

Plan: TypeAlias = Literal["combine", "retain_only", "drop"]
Gradients: TypeAlias = list[list[Tensor | None]]
COUNTERS = ("steps", "zero_lr_steps", "not_finite_steps", "rejected_steps", "dropped_steps", "undone_steps")


@dataclass
class Engine:
    """Makes the steps of a `HAMUOptimizer`, and holds all that changes.

    LightningOptimizer and Fabric copy the optimizer's `__dict__`: they share this object, which is never rebound.
    """

    base: Optimizer
    rule: Rule
    names: dict[Tensor, str]
    exact: bool = False
    track_actual: bool = False
    reuse_groups: bool = False
    sketch: Sketch | None = None
    recompute: Callable[[str], object] | None = None
    mask: Mask | None = None
    plain: Optimizer | None = None
    slots: dict[str, GradientSlot] = field(default_factory=dict)
    spent: SpentGradients = field(default_factory=SpentGradients)
    aims: dict[str, Aim] = field(default_factory=dict)
    layout: Layout | None = None
    last_step: StepReport | None = None
    plan: Plan = "combine"
    groups: tuple[str, ...] = ()
    window_shares: tuple[float, float] = (1.0, 1.0)
    approve: Callable[[StepReport], bool] | None = None
    referee: Referee | None = None
    unscalings: list[Unscaling] = field(default_factory=list)
    calls: int = 0
    steps: int = 0
    zero_lr_steps: int = 0
    not_finite_steps: Tensor | int = 0
    rejected_steps: int = 0
    dropped_steps: int = 0
    undone_steps: int = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy does not take part in the step that a loss scaler has begun."""
        return {**self.__dict__, "unscalings": []}

    @property
    def parameters(self) -> list[Tensor]:
        """All tensors of the base optimizer."""
        return [p for group in self.base.param_groups for p in group["params"]]

    @property
    def is_filled(self) -> bool:
        """Whether a slot holds a gradient of the present step."""
        return any(slot.is_fresh for slot in self.slots.values())

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
        self.dropped_steps += self.is_filled
        self.release_slots()

    def find_aim(self, name: str) -> Aim:
        """Return what follows the loss of a group."""
        return self.aims.setdefault(name, Aim())

    def update_layout(self) -> Layout:
        """The layout, made again when the set of trainable tensors has changed."""
        trainable = tuple(p for p in self.parameters if p.requires_grad)
        if self.layout is None or [*map(id, self.layout.parameters)] != [*map(id, trainable)]:
            self.layout = make_layout(self.base.param_groups, self.names, self.rule.blocks, self.mask)
        return self.layout

    def notice_overflow(self) -> None:
        """Drop the gradients of a step that the scaler has ended without calling `step()`."""
        if not self.unscalings or not self.unscalings[0].is_over:
            return
        if self.is_filled:
            first = self.unscalings[0]
            self.spent.remember(p for p in self.parameters if first.is_stale(p.grad))
            self.drop_step()
        self.unscalings = []

    @torch.no_grad()
    def step(self) -> None:
        """Do what is planned, and let the gradients go."""
        plan, self.plan = self.plan, "combine"
        self.base._opt_called = True  # type: ignore[attr-defined]  # else schedulers warn when a step is left out
        is_initialisation = plan == "combine" and self._is_initialisation()
        self.calls += not is_initialisation
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
        applier, parameters = self._applier(takes_d=False), self.parameters
        if self.mask is None:
            applier.step()
            return
        masked = self.mask.hide_all([p.grad for p in parameters], parameters)
        with pointed_gradients(parameters, masked):
            self._apply(applier)

    def _is_initialisation(self) -> bool:
        """Whether this step only makes the base's state: torch's `get_optimizer_state_dict` takes one at lr 0."""
        return not self.is_filled and all(float(group["lr"]) == 0 for group in self.base.param_groups)

    def _combine_and_step(self) -> None:
        layout, groups = self.update_layout(), self.groups or self.rule.groups
        gradients = self._gather(groups, layout)
        self.steps += 1
        if not self.rule.is_plain and is_at_rest(self.base.param_groups):
            self.zero_lr_steps += 1
            return
        self.last_step = self._ask_rule(groups, gradients, layout)
        if self.approve is not None and not self.approve(self.last_step):
            self.rejected_steps += 1
            return
        if self.referee is None or self.rule.is_plain or not self.referee.is_due:
            self._take_step(groups, gradients, layout)
        elif not self._take_step_on_trial(groups, gradients, layout, self.referee):
            self.undone_steps += 1
            return
        for name in self.rule.target_quotas:
            if name in groups:
                self.find_aim(name).advance(self.last_step.improvement(name))

    def _gather(self, groups: tuple[str, ...], layout: Layout) -> Gradients:
        """The gradients of each group, in the order of the layout."""
        retain = [None if self.spent.is_spent(p) else p.grad for p in layout.parameters]
        slots = [self.find_slot(name) for name in groups[1:]]
        is_there = [any(g is not None for g in retain), *(slot.is_filled for slot in slots)]
        # Gradients of earlier steps alone say nothing new.
        check_all_present(groups, is_there if self.is_filled else [is_there[0], *(False for _ in slots)])
        others = [[slot.get(p) for p in layout.parameters] for slot in slots]
        if self.mask is not None:
            retain = self.mask.hide_all(retain, layout.parameters)  # copies: `.grad` is the user's
            for grads in others:
                self.mask.hide_(grads, layout.parameters)
        return [retain, *others]

    def _take_step_on_trial(
        self, groups: tuple[str, ...], gradients: Gradients, layout: Layout, referee: Referee
    ) -> bool:
        """Apply the step, and take it back as long as the referee does not accept it; return whether it did at last."""
        before = Snapshot(self._applier(takes_d=True), layout.parameters)
        while True:
            self._take_step(groups, gradients, layout, keeps_last=True)
            assert self.last_step is not None
            if not bool(self.last_step.coefficients.is_finite):
                return True  # it has moved nothing, and is counted: the promise is not to blame
            if not self._moves_by_d:
                before.shorten_step(referee.region)
                self.last_step = self._measure(groups, gradients, self.last_step, before.weights)
            verdict = referee.judge(self.last_step)
            if verdict == "accept":
                return True
            before.restore()
            if verdict == "drop":
                return False
            self.last_step = self._ask_rule(groups, gradients, layout)

    @property
    def _moves_by_d(self) -> bool:
        """Whether the weights move by the rule's step, and so follow its radius; Adam's and momentum's do not."""
        return self.exact or is_plain_sgd(self.base)

    def _take_step(
        self, groups: tuple[str, ...], gradients: Gradients, layout: Layout, *, keeps_last: bool = False
    ) -> None:
        """Let the base apply the last answer of the rule."""
        assert self.last_step is not None
        before = [p.detach().clone() for p in layout.parameters] if self.track_actual else None
        # The combination is written over the last gradients: they may be needed again to measure, or in later steps.
        keeps_last |= self.track_actual or self.reuse_groups
        spare = _with_spare_last(gradients) if keeps_last else gradients
        combined, self.last_step = self._combine(groups, spare, self.last_step, layout)
        with pointed_gradients(layout.parameters, combined):
            self._step_base()
        if before is not None:
            self.last_step = self._measure(groups, gradients, self.last_step, before)

    def _measure(
        self, groups: tuple[str, ...], gradients: Gradients, report: StepReport, before: list[Tensor]
    ) -> StepReport:
        """Add what the weights' actual change does to the losses, to first order."""
        change = [p.detach() - old for p, old in zip(self.update_layout().parameters, before, strict=True)]
        products = compute_gramian(*gradients, change).sum(dim=0)[: len(groups), -1]
        return replace(report, actual_changes=self._as_means(products, groups))

    def _as_means(self, numbers: Tensor, groups: tuple[str, ...]) -> Tensor:
        """Turn numbers `[..., n]` about the gradients in the slots into those of the means over the window."""
        slots = [self.slots.get(name) for name in groups[1:]]
        own, others = self.window_shares
        shares = [own, *(others if s is None or s.is_fresh else s.share for s in slots)]
        if all(share == 1 for share in shares):  # a new tensor would be one more copy from the host in each step
            return numbers
        return numbers / numbers.new_tensor(shares)

    def _applier(self, *, takes_d: bool) -> Optimizer:
        """What moves the weights: the base, or (`exact`) plain SGD, at rate 1 where its gradient is `-d` itself."""
        if not self.exact:
            return self.base
        known = [] if self.plain is None else [[*map(id, group["params"])] for group in self.plain.param_groups]
        groups = self.base.param_groups
        if self.plain is None or known != [[*map(id, group["params"])] for group in groups]:
            self.plain = SGD([{"params": list(group["params"])} for group in groups], lr=0.0)
        for plain, group in zip(self.plain.param_groups, groups, strict=True):
            plain["lr"] = 1.0 if takes_d else group["lr"]
        return self.plain

    def _ask_rule(self, groups: tuple[str, ...], gradients: Gradients, layout: Layout) -> StepReport:
        """Compute the Gramians of the mean gradients, and ask the rule for the coefficients."""
        rule = self.rule
        if self.referee is not None and self.referee.region != 1 and self._moves_by_d:
            rule = rule.in_region(self.referee.region)
        gramian = self._as_means(self._compute_gramian(groups, gradients, layout), groups)
        gramian = self._as_means(gramian.mT, groups).mT
        for unscaling in self.unscalings:
            if unscaling.found_inf is not None:
                # Clipping by value would hide an overflow from the rule, although the scaler backs off.
                gramian = gramian.masked_fill(unscaling.found_inf.to(gramian.device), torch.nan)
        known: dict[str, Any] = {}
        if rule.radius.needs_weights:
            known = {"weight_norms": layout.weight_norms(), "sizes": layout.vector(layout.sizes)}
        targets = {name: quota for name, quota in rule.target_quotas.items() if name in groups}
        known |= rule.step_arguments(groups, {n: self.find_aim(n).resolve(quota) for n, quota in targets.items()})
        lr = layout.learning_rates(self.base.param_groups)
        return StepReport(gramian, rule.coefficients(gramian, lr=lr, **known), lr, layout.labels)

    def _compute_gramian(self, groups: tuple[str, ...], gradients: Gradients, layout: Layout) -> Tensor:
        """The Gramians `[B, n, n]`: of the gradients, or of their projections."""
        if self.sketch is None:
            return compute_gramian(*gradients, blocks=layout.blocks)
        slots = [self.slots[name] for name in groups[1:]]
        kept = [slot.projection for slot in slots if isinstance(slot, SketchSlot) and slot.projection is not None]
        rows = torch.stack([self.sketch.project(gradients[0], layout.blocks), *kept], dim=1)  # [B, n, size]
        return rows @ rows.mT

    def _combine(
        self, groups: tuple[str, ...], gradients: Gradients, report: StepReport, layout: Layout
    ) -> tuple[list[Tensor | None], StepReport]:
        """The gradients that make the base apply the coefficients: `-c/lr` times each (`exact`: `-c` times)."""
        step = report.coefficients
        if self.rule.is_plain:
            return gradients[0], report
        lr = report.lr.unsqueeze(1)
        # The rule saw mean gradients; the slots hold shares of them.
        factors = self._as_means(-step.values, groups)
        factors = torch.where(lr == 0, 0, factors if self.exact else factors / lr)
        if self.sketch is not None:
            again = make_gradients_again(groups[1:], self.recompute, self.parameters, layout.parameters)
            combined, is_finite = add_up(gradients[0], again, factors, layout.blocks, step.is_finite)
        else:
            combined, is_finite = combine_(gradients, factors, layout.blocks, step.is_finite)
        return combined, report.left_out_unless(is_finite)

    def _step_base(self) -> None:
        """Let the base apply the gradients, unless they are not finite; plain SGD then gets zeros and does not move."""
        assert self.last_step is not None
        coefficients, applier = self.last_step.coefficients, self._applier(takes_d=not self.rule.is_plain)
        if not self.rule.is_plain:
            self.not_finite_steps = self.not_finite_steps + (~coefficients.is_finite).long()
            # Momentum, weight decay and Adam move the weights even with a zero gradient: one flag is read.
            if not is_plain_sgd(applier) and not bool(coefficients.is_finite):
                return
        self._apply(applier)

    def _apply(self, applier: Optimizer) -> None:
        """Let an optimizer move the weights; those outside of the mask rest, whatever it does on its own."""
        if self.mask is None or is_plain_sgd(applier):  # which moves nothing where the gradient is zero
            applier.step()
        else:
            with self.mask.holding(self.parameters):
                applier.step()


def _with_spare_last(gradients: Gradients) -> Gradients:
    """The same gradients, with copies of the last group's."""
    return [*gradients[:-1], [None if g is None else g.clone() for g in gradients[-1]]]
