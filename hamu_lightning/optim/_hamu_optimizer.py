"""HAMUOptimizer: keeps the two gradients apart, and gives the base optimizer the one that moves the weights by `d`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from typing_extensions import override

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.gramian import compute_gramian
from hamu_lightning.optim._aim import Aim
from hamu_lightning.optim._checks import (
    check_base,
    check_both_present,
    check_group,
    is_at_rest,
    is_plain_sgd,
    warn_about_base,
)
from hamu_lightning.optim._combine import combine_
from hamu_lightning.optim._layout import Layout, collect_names, make_layout
from hamu_lightning.optim._report import StepReport
from hamu_lightning.optim._scaling import Unscaling
from hamu_lightning.optim._slots import GradientSlot, SpentGradients, own_gradients_, pointed_gradients
from hamu_lightning.optim._trial import Referee, Snapshot
from hamu_lightning.rules import Coefficients, Rule

Plan: TypeAlias = Literal["combine", "retain_only", "drop"]
COUNTERS = ("steps", "zero_lr_steps", "not_finite_steps", "rejected_steps", "dropped_steps", "undone_steps")


@dataclass
class _Core:
    """All that changes. LightningOptimizer and Fabric copy the wrapper's `__dict__`: they share this object."""

    base: Optimizer
    rule: Rule
    names: dict[Tensor, str]
    exact: bool = False
    track_actual: bool = False
    plain: Optimizer | None = None
    forget_slot: GradientSlot = field(default_factory=GradientSlot)
    spent: SpentGradients = field(default_factory=SpentGradients)
    aim: Aim = field(default_factory=Aim)
    layout: Layout | None = None
    last_step: StepReport | None = None
    plan: Plan = "combine"
    window_shares: tuple[float, float] = (1.0, 1.0)
    approve: Callable[[StepReport], bool] | None = None
    referee: Referee | None = None
    unscaling: Unscaling | None = None
    calls: int = 0
    steps: int = 0
    zero_lr_steps: int = 0
    not_finite_steps: Tensor | int = 0
    rejected_steps: int = 0
    dropped_steps: int = 0
    undone_steps: int = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy does not take part in the step that a loss scaler has begun."""
        return {**self.__dict__, "unscaling": None}


class HAMUOptimizer(Optimizer):
    """Wraps an optimizer so that each step follows an unlearning rule.

    The problem: the weights should move by `d = c_r g_r + c_f g_f` per block, where `g_r`, `g_f` are the gradients of
    the retain and of the forget loss and the coefficients come from a rule such as `HAMUQ` (Chen et al. 2026).

    One step:

    1. `with optimizer.forget():` points `.grad` at a slot of its own; `backward()` inside accumulates there. On
       leaving, `.grad` is what it was.
    2. `with optimizer.retain():` accumulates into `.grad` itself, after dropping gradients that the last step has
       used. A plain `backward()` after `zero_grad()` does the same. The order of 1 and 2 is free.
    3. `step()` computes the Gramians of the two gradients, asks the rule for the coefficients, and writes the
       equivalent gradient `(-c_r/lr) g_r + (-c_f/lr) g_f` over the forget slot.
    4. It points `.grad` at that, calls the base optimizer's `step()`, and points `.grad` back at the retain gradient.
    5. It releases the forget slot, and keeps the `StepReport` in `last_step`.

    Plain SGD as the base moves the weights by `d` to within one rounding of the weight. Other bases (momentum, weight
    decay, Adam) take the equivalent gradient as if it came from a loss: the quota and the radius then do not hold for
    the weights, and a warning says so. A step with a non-finite number in its Gramians is left out and counted; so is
    one whose equivalent gradient float16 cannot hold, and one where every learning rate is 0. Nothing is read on the
    host, except one flag per step when the base is not plain SGD (to leave out a non-finite step).

    With a `GradScaler` scale both losses, and call `scaler.unscale_(optimizer)`, `optimizer.unscale_forget_(scaler)`,
    `scaler.step(optimizer)`, `scaler.update()`. An overflow of either gradient makes the scaler back off and leaves the
    step out.

    `state_dict()` is the base's, so that plain checkpoints load both ways; our counters are in `hamu_state_dict()`.
    Parameter groups, state and defaults are the base's own: schedulers work on the wrapper and on the base.

    Args:
        base: Any torch optimizer with a learning rate per group; not LBFGS, not with `maximize=True`.
        rule: A rule from `hamu_lightning.rules`.
        named_parameters: Names and tensors as from `module.named_parameters()`: labels of the blocks, needed for
            `blocks="layer"` or a function unless the base was built from named parameters.
        exact: Take the learning rates from the base, and nothing else: every step moves the weights by `d`, as with
            plain SGD. Momentum, weight decay and the step hooks of the base do not act, and its state stays empty.
        track_actual: Measure `g_f·dw` and `-g_r·dw` of the weights' actual change `dw`, in loss units: the `actual`
            improvements of the report. Costs a copy of the weights and one of the forget gradient in each step.

    Raises:
        HAMUValueError: If the base cannot be wrapped, or the rule's blocks need names that are not known.

    Example:
        >>> import torch
        >>> from hamu_lightning.rules import HAMUQ
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = HAMUOptimizer(torch.optim.SGD([weight], lr=0.1), HAMUQ(quota=0.01))
        >>> with optimizer.retain():
        ...     (weight[0] ** 2).backward()
        >>> with optimizer.forget():
        ...     weight.sum().backward()
        >>> optimizer.step()
        >>> optimizer.last_step.coefficients.forget_improvement
        tensor(0.0100, dtype=torch.float64)
    """

    _core: _Core

    def __init__(
        self,
        base: Optimizer,
        rule: Rule,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        *,
        exact: bool = False,
        track_actual: bool = False,
    ) -> None:
        if isinstance(base, HAMUOptimizer):
            raise HAMUValueError("Expected `base` to be a plain optimizer, but got a HAMUOptimizer: wrap it once.")
        check_base(base)
        if not isinstance(rule, Rule):
            raise HAMUValueError(f"Expected `rule` to be a rule such as HAMUQ(quota=1e-3), but got {rule!r}.")
        names = collect_names(base.param_groups)
        names.update({parameter: name for name, parameter in named_parameters or ()})
        self.__setstate__({"_core": _Core(base, rule, names, exact, track_actual)})
        layout = self._update_layout()
        if rule.radius.needs_weights and not any(bool(p.any()) for p in layout.parameters):
            raise HAMUValueError(
                f"Expected some weight to differ from zero with {rule.radius}, but all are zero. "
                "A radius relative to the weights needs weights: use FixedRadius, or load the trained model first."
            )
        if not exact:
            warn_about_base(base, rule)

    @property
    def base(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._core.base

    @property
    def rule(self) -> Rule:
        """The rule that combines the gradients."""
        return self._core.rule

    @property
    def last_step(self) -> StepReport | None:
        """What the last combined step did; None before the first.

        One with numbers that are not finite reports NOT_FINITE; one that was refused or undone, what it was to do.
        """
        return self._core.last_step

    @property
    def steps(self) -> int:
        """How many combined steps were asked for by `step()`, the left-out ones included."""
        return self._core.steps

    @property
    def calls(self) -> int:
        """How many times `step()` was called, whatever it was to do."""
        return self._core.calls

    @property
    def applied_steps(self) -> Tensor:
        """How many combined steps have moved the weights: 0-d, on the device."""
        core = self._core
        return core.steps - core.zero_lr_steps - core.rejected_steps - core.undone_steps - self.not_finite_steps

    @property
    def left_out_steps(self) -> Tensor:
        """How many combined steps came to nothing: not finite, learning rate 0, dropped, undone. 0-d, on the device."""
        core = self._core
        return core.zero_lr_steps + core.dropped_steps + core.undone_steps + self.not_finite_steps

    @property
    def zero_lr_steps(self) -> int:
        """How many steps found every learning rate at 0 and did nothing."""
        return self._core.zero_lr_steps

    @property
    def not_finite_steps(self) -> Tensor:
        """How many steps were left out because of a non-finite number: 0-d, on the device."""
        return torch.as_tensor(self._core.not_finite_steps)

    @property
    def dropped_steps(self) -> int:
        """How many combined steps came to nothing before the rule was asked: no retain loss, or a scaler's overflow."""
        return self._core.dropped_steps

    @property
    def undone_steps(self) -> int:
        """How many combined steps the referee gave up."""
        return self._core.undone_steps

    @contextmanager
    def retain(self) -> Iterator[None]:
        """Accumulate the retain gradient: `with optimizer.retain(): loss.backward()`."""
        self._notice_overflow()
        for parameter in self._parameters():
            if self._core.spent.is_spent(parameter):
                parameter.grad = None
        yield

    @contextmanager
    def forget(self) -> Iterator[None]:
        """Accumulate the forget gradient in its own slot: `with optimizer.forget(): loss.backward()`."""
        self._notice_overflow()
        own_gradients_(self._parameters(), self._core.spent)
        with self._core.forget_slot.filling(self._parameters()):
            yield

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Combine the two gradients and let the base optimizer apply the result.

        Args:
            closure: Called first, with gradients enabled; it may compute one of the two gradients (Lightning does).

        Returns:
            What the closure returned, or None.

        Raises:
            HAMUStateError: If one of the two gradients is missing. One objective alone is never applied.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._apply()
        return result

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the retain gradient (inside `forget()`: the forget gradient). The other one is kept."""
        self._core.base.zero_grad(set_to_none)

    def plan_step(self, plan: Plan = "combine", *, window_shares: tuple[float, float] = (1.0, 1.0)) -> None:
        """Say what the next `step()` is to do; afterwards it is "combine" again.

        Args:
            plan: "combine" the two gradients, take a plain step of the base on the retain gradient ("retain_only"), or
                do nothing ("drop").
            window_shares: The shares of the mean retain and of the mean forget gradient that the slots hold: n/N when
                losses were divided by N but only n micro-batches came (the last window of an epoch).
        """
        self._core.plan, self._core.window_shares = plan, window_shares

    @property
    def approve(self) -> Callable[[StepReport], bool] | None:
        """Called with the report of each step before weights move; a step that it answers False for is left out."""
        return self._core.approve

    @approve.setter
    def approve(self, approve: Callable[[StepReport], bool] | None) -> None:
        self._core.approve = approve

    @property
    def referee(self) -> Referee | None:
        """Judges steps after they were applied; one that it does not accept is taken back, and may be tried again."""
        return self._core.referee

    @referee.setter
    def referee(self, referee: Referee | None) -> None:
        self._core.referee = referee

    @property
    def aim(self) -> Aim:
        """Where the forget loss is and where it should go, for a rule with a `TargetQuota`."""
        return self._core.aim

    @property
    def has_forget_gradient(self) -> bool:
        """Whether the forget slot holds a gradient."""
        return self._core.forget_slot.is_filled

    def release_forget(self) -> None:
        """Drop the forget gradient."""
        self._core.forget_slot.release()

    def drop_step(self) -> None:
        """Give up a step whose forget gradient is there already, and count it."""
        self._core.dropped_steps += self.has_forget_gradient
        self.release_forget()

    def unscale_forget_(self, scaler: torch.amp.GradScaler) -> None:
        """Divide the forget gradient by the loss scale, as `scaler.unscale_(optimizer)` does with the retain gradient.

        A non-finite forget gradient counts as an overflow: the scaler backs off at its next `update()`, and the
        combined step leaves itself out. (Not with `FineTune`, which does not use it.) After an overflow of the retain
        gradient the scaler does not call `step()`; the next `retain()` or `forget()` drops both gradients.

        Raises:
            HAMUStateError: If there is no forget gradient, or it is unscaled already.
        """
        core = self._core
        if not scaler.is_enabled():
            return
        self._notice_overflow()
        if core.unscaling is not None:
            raise HAMUStateError(
                "Expected one `unscale_forget_` per step, but the forget gradient is unscaled already. "
                "Call `scaler.step(optimizer)` and `scaler.update()` first."
            )
        if not self.has_forget_gradient:
            raise HAMUStateError(
                "Expected a forget gradient to unscale, but there is none. Call `unscale_forget_` after "
                "`with optimizer.forget(): scaler.scale(loss).backward()` and before `scaler.step(optimizer)`."
            )
        retain = [p.grad for p in self._parameters()]
        with self.forget():
            filled = [p for p in self._parameters() if p.grad is not None]
            core.unscaling = Unscaling(scaler, filled, retain, tells=not core.rule.is_plain)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state, nothing else."""
        return self._core.base.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the base optimizer's state."""
        self._core.base.load_state_dict(state_dict)

    def hamu_state_dict(self) -> dict[str, Any]:
        """Return our own state: the counters, and the forget loss that a target needs."""
        return {**{name: int(getattr(self._core, name)) for name in COUNTERS}, "aim": self._core.aim.state_dict()}

    def load_hamu_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `hamu_state_dict` returned."""
        for name in COUNTERS:
            setattr(self._core, name, state_dict.get(name, 0))
        if "aim" in state_dict:
            self._core.aim.load_state_dict(state_dict["aim"])

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer.

        Raises:
            HAMUValueError: If the group cannot be used.
        """
        check_group(self._core.base, param_group)
        self._core.base.add_param_group(param_group)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups: the very list, also after it was replaced by `load_state_dict`."""
        return self._core.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._core.base.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state."""
        return self._core.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's defaults."""
        return self._core.base.defaults

    @override
    def __repr__(self) -> str:
        return f"HAMUOptimizer({self.rule}, {self.base})"

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {"_core": self._core}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _update_layout(self) -> Layout:
        """The layout, made again when the set of trainable tensors has changed."""
        core = self._core
        trainable = tuple(p for p in self._parameters() if p.requires_grad)
        if core.layout is None or [*map(id, core.layout.parameters)] != [*map(id, trainable)]:
            core.layout = make_layout(self.param_groups, core.names, core.rule.blocks)
        return core.layout

    def _notice_overflow(self) -> None:
        """Drop the gradients of a step that the scaler has ended without calling `step()`."""
        core = self._core
        if core.unscaling is None or not core.unscaling.is_over:
            return
        if self.has_forget_gradient:
            core.spent.remember(p for p in self._parameters() if core.unscaling.is_stale(p.grad))
            self.drop_step()
        core.unscaling = None

    @torch.no_grad()
    def _apply(self) -> None:
        core, plan = self._core, self._core.plan
        core.plan = "combine"
        core.base._opt_called = True  # type: ignore[attr-defined]  # else schedulers warn when a step is left out
        is_initialisation = plan == "combine" and self._is_initialisation()
        core.calls += not is_initialisation
        if is_initialisation or plan == "retain_only":
            self._applier(takes_d=False).step()
        elif plan == "combine":
            self._combine_and_step()
        else:
            self.drop_step()
        core.forget_slot.release()
        core.spent.remember(self._parameters())
        core.window_shares = 1.0, 1.0

    def _is_initialisation(self) -> bool:
        """Whether this step only makes the base's state: torch's `get_optimizer_state_dict` takes one at lr 0."""
        return not self._core.forget_slot.is_filled and all(float(group["lr"]) == 0 for group in self.param_groups)

    def _combine_and_step(self) -> None:
        core, layout = self._core, self._update_layout()
        retain = [None if core.spent.is_spent(p) else p.grad for p in layout.parameters]
        forget = [core.forget_slot.get(p) for p in layout.parameters]
        check_both_present(any(g is not None for g in retain), core.forget_slot.is_filled)
        core.steps += 1
        if not core.rule.is_plain and is_at_rest(self.param_groups):
            core.zero_lr_steps += 1
            return
        core.last_step = self._ask_rule(retain, forget, layout)
        if core.approve is not None and not core.approve(core.last_step):
            core.rejected_steps += 1
            return
        if core.referee is None or core.rule.is_plain or not core.referee.is_due:
            self._take_step(retain, forget, layout)
        elif not self._take_step_on_trial(retain, forget, layout, core.referee):
            core.undone_steps += 1
            return
        if core.rule.target_quota is not None:
            step, actual = core.last_step.coefficients, core.last_step.actual_improvements
            core.aim.advance(step.forget_improvement if actual is None else actual[1])

    def _take_step_on_trial(
        self, retain: list[Tensor | None], forget: list[Tensor | None], layout: Layout, referee: Referee
    ) -> bool:
        """Apply the step, and take it back as long as the referee does not accept it; return whether it did at last."""
        core, before = self._core, Snapshot(self._applier(takes_d=True), layout.parameters)
        while True:
            # The combination is written over the forget gradients; they may be needed again.
            self._take_step(retain, [None if g is None else g.clone() for g in forget], layout)
            assert core.last_step is not None
            if not bool(core.last_step.coefficients.is_finite):
                return True  # it has moved nothing, and is counted: the promise is not to blame
            if not self._moves_by_d:
                before.shorten_step(referee.region)
                core.last_step = self._measure(core.last_step, retain, forget, before.weights)
            verdict = referee.judge(core.last_step)
            if verdict == "accept":
                return True
            before.restore()
            if verdict == "drop":
                return False
            core.last_step = self._ask_rule(retain, forget, layout)

    @property
    def _moves_by_d(self) -> bool:
        """Whether the weights move by the rule's step, and so follow its radius; Adam's and momentum's do not."""
        return self._core.exact or is_plain_sgd(self._core.base)

    def _take_step(self, retain: list[Tensor | None], forget: list[Tensor | None], layout: Layout) -> None:
        """Let the base apply the last answer of the rule."""
        core = self._core
        assert core.last_step is not None
        before = [p.detach().clone() for p in layout.parameters] if core.track_actual else None
        # The combination is written over the forget gradients; they are needed again to measure.
        spare = [None if g is None else g.clone() for g in forget] if core.track_actual else forget
        combined, core.last_step = self._combine(retain, spare, core.last_step, layout)
        with pointed_gradients(layout.parameters, combined):
            self._step_base(core.last_step.coefficients)
        if before is not None:
            core.last_step = self._measure(core.last_step, retain, forget, before)

    def _measure(
        self, report: StepReport, retain: list[Tensor | None], forget: list[Tensor | None], before: list[Tensor]
    ) -> StepReport:
        """Add what the weights' actual change does to both losses, to first order."""
        change = [p.detach() - old for p, old in zip(self._update_layout().parameters, before, strict=True)]
        products = self._as_means(compute_gramian(retain, forget, change).sum(dim=0)[:2, 2])
        return replace(report, actual_improvements=torch.stack((-products[0], products[1])))

    def _as_means(self, numbers: Tensor) -> Tensor:
        """Turn numbers `[..., 2]` about the gradients in the slots into those of the means over the window."""
        shares = self._core.window_shares
        if shares == (1.0, 1.0):  # a new tensor would be one more copy from the host in each step
            return numbers
        return numbers / numbers.new_tensor(shares)

    def _applier(self, *, takes_d: bool) -> Optimizer:
        """What moves the weights: the base, or (`exact`) plain SGD, at rate 1 where its gradient is `-d` itself."""
        core = self._core
        if not core.exact:
            return core.base
        known = [] if core.plain is None else [[*map(id, group["params"])] for group in core.plain.param_groups]
        if core.plain is None or known != [[*map(id, group["params"])] for group in self.param_groups]:
            core.plain = SGD([{"params": list(group["params"])} for group in self.param_groups], lr=0.0)
        for plain, group in zip(core.plain.param_groups, self.param_groups, strict=True):
            plain["lr"] = 1.0 if takes_d else group["lr"]
        return core.plain

    def _ask_rule(self, retain: list[Tensor | None], forget: list[Tensor | None], layout: Layout) -> StepReport:
        """Compute the Gramians of the mean gradients, and ask the rule for the coefficients."""
        core, rule = self._core, self._core.rule
        if core.referee is not None and core.referee.region != 1 and self._moves_by_d:
            rule = rule.in_region(core.referee.region)
        gramian = self._as_means(compute_gramian(retain, forget, blocks=layout.blocks))
        gramian = self._as_means(gramian.mT).mT
        if core.unscaling is not None and core.unscaling.found_inf is not None:
            # Clipping by value would hide an overflow from the rule, although the scaler backs off.
            gramian = gramian.masked_fill(core.unscaling.found_inf.to(gramian.device), torch.nan)
        known: dict[str, Tensor] = {}
        if rule.radius.needs_weights:
            known = {"weight_norms": layout.weight_norms(), "sizes": layout.vector(layout.sizes)}
        if rule.target_quota is not None:
            known["quota"] = core.aim.resolve(rule.target_quota)
        lr = layout.learning_rates(self.param_groups)
        return StepReport(gramian, rule.coefficients(gramian, lr=lr, **known), lr, layout.labels)

    def _combine(
        self, retain: list[Tensor | None], forget: list[Tensor | None], report: StepReport, layout: Layout
    ) -> tuple[list[Tensor | None], StepReport]:
        """The gradients that make the base apply the coefficients: `-c/lr` times the two (`exact`: `-c` times)."""
        step, core = report.coefficients, self._core
        if core.rule.is_plain:
            return retain, report
        lr = report.lr.unsqueeze(1)
        # The rule saw mean gradients; the slots hold shares of them.
        factors = self._as_means(-step.values)
        factors = torch.where(lr == 0, 0, factors if core.exact else factors / lr)
        factors = factors[torch.tensor(layout.blocks, device=factors.device)]
        combined, is_finite = combine_(retain, forget, factors, step.is_finite)
        return combined, report.left_out_unless(is_finite)

    def _step_base(self, coefficients: Coefficients) -> None:
        """Let the base apply the gradients, unless they are not finite; plain SGD then gets zeros and does not move."""
        core, applier = self._core, self._applier(takes_d=not self._core.rule.is_plain)
        if not core.rule.is_plain:
            core.not_finite_steps = core.not_finite_steps + (~coefficients.is_finite).long()
            # Momentum, weight decay and Adam move the weights even with a zero gradient: one flag is read.
            if not is_plain_sgd(applier) and not bool(coefficients.is_finite):
                return
        applier.step()
