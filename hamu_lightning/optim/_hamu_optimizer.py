"""HAMUOptimizer: keeps the gradients apart, and gives the base optimizer the one that moves the weights by `d`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from hamu_lightning.checks import check_flag, check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.optim._aim import Aim
from hamu_lightning.optim._checks import (
    check_base,
    check_can_move,
    check_reads_grad,
    check_sketch,
    warn_about_base,
    warn_about_rounding,
)
from hamu_lightning.optim._counters import CountedSteps, Counters
from hamu_lightning.optim._engine import Engine
from hamu_lightning.optim._layout import collect_names
from hamu_lightning.optim._mask import NamedMasks, make_mask
from hamu_lightning.optim._report import StepReport
from hamu_lightning.optim._scaling import Unscaling
from hamu_lightning.optim._sketch import Sketch
from hamu_lightning.optim._slots import own_gradients_
from hamu_lightning.optim._steering import SteeredSteps
from hamu_lightning.optim._wrapper import OptimizerWrapper
from hamu_lightning.rules import Adapter, Rule, check_adapters


class HAMUOptimizer(CountedSteps, SteeredSteps, OptimizerWrapper):
    """Wraps an optimizer so that each step follows an unlearning rule.

    The problem: the weights should move by `d = c_r g_r + c_f g_f` per block, where `g_r`, `g_f` are the gradients of
    the retain and of the forget loss and the coefficients come from a rule such as `HAMUQ` (Chen et al. 2026). A rule
    for more groups, such as `FeasibleDirection`, has one gradient and one coefficient for each of them.

    One step:

    1. `with optimizer.forget():` points `.grad` at a slot of its own; `backward()` inside accumulates there. On
       leaving, `.grad` is what it was. With more groups: `with optimizer.group(name):` for each of them.
    2. `with optimizer.retain():` accumulates into `.grad` itself, after dropping gradients that the last step has
       used. A plain `backward()` after `zero_grad()` does the same. The order of 1 and 2 is free.
    3. `step()` computes the Gramians of the gradients, asks the rule for the coefficients, and writes the equivalent
       gradient `(-c_r/lr) g_r + (-c_f/lr) g_f` over the forget slot (of several: the last one).
    4. It points `.grad` at that, calls the base optimizer's `step()`, and points `.grad` back at the retain gradient.
    5. It releases the slots, and keeps the `StepReport` in `last_step`.

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
            `blocks="layer"` or a function unless the base was built from named parameters. The method itself,
            `module.named_parameters`, is asked again for tensors that are added later.
        exact: Take the learning rates from the base, and nothing else: every step moves the weights by `d`, as with
            plain SGD. Momentum, weight decay and the step hooks of the base do not act, and its state stays empty.
        track_actual: Measure `g_f·dw` and `-g_r·dw` of the weights' actual change `dw`, in loss units: the `actual`
            improvements of the report. Costs a copy of the weights and one of the forget gradient in each step.
        reuse_groups: A group that has no gradient in a step takes part with its last one, which the optimizer keeps
            (one more gradient of memory). At least one group other than retain must have a new one.
        sketch: Keep projections of so many numbers instead of the gradients, so that many groups fit: memory for two
            gradients, whatever the number of groups. Each group's backward pass runs twice: `recompute` is called in
            `step()` with the name of each group. Inner products, and so the promises of a step, are off by about
            `1/sqrt(sketch)` of the product of the lengths. For rules with `blocks="global"`.
        mask: For names or tensors a bool tensor of the same shape, True where a weight may move (SalUn, Fan et al.
            2024). All others rest exactly, whatever the rule and the base, and the step is that of the problem without
            them: so are Gramians, radii, quotas and promises. A tensor that is not named, or added later by
            `add_param_group`, moves as without a mask. Costs a copy of the masked tensors' retain gradients in each
            step, one of their weights with a base other than plain SGD, and a byte per weight. Like the rule it is no
            part of a checkpoint: give the same one when a run goes on. Gradients are clipped before they are masked.
        adapters: Which of the weights are factors of low-rank adapters, as from `find_adapters(module)` of
            `hamu_lightning.rules`: for `AdapterRadius`.

    Raises:
        HAMUValueError: If the base cannot be wrapped, the rule's blocks need names that are not known, or the
            mask does not fit the weights.

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

    def __init__(
        self,
        base: Optimizer,
        rule: Rule,
        named_parameters: Iterable[tuple[str, Tensor]] | Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
        *,
        exact: bool = False,
        track_actual: bool = False,
        reuse_groups: bool = False,
        sketch: int | None = None,
        mask: NamedMasks | None = None,
        adapters: Iterable[Adapter] = (),
    ) -> None:
        if isinstance(base, HAMUOptimizer):
            raise HAMUValueError("Expected `base` to be a plain optimizer, but got a HAMUOptimizer: wrap it once.")
        check_base(base)
        check_type("rule", rule, Rule, "a rule such as HAMUQ(quota=1e-3)")
        exact, track_actual = check_flag("exact", exact), check_flag("track_actual", track_actual)
        reuse_groups = check_flag("reuse_groups", reuse_groups)
        find_names = named_parameters if callable(named_parameters) else None
        names = collect_names(base.param_groups, named_parameters() if callable(named_parameters) else named_parameters)
        self.__setstate__({"_core": Engine(base, rule, names, find_names, exact, track_actual, reuse_groups)})
        if sketch is not None:
            check_sketch(rule, track_actual or reuse_groups or mask is not None)
            self._core.sketch = Sketch(sketch)
        if mask is not None:
            self._core.mask = make_mask(mask, names, self._core.parameters)
        self._core.adapters = check_adapters(adapters)
        layout = self._core.update_layout()
        check_can_move(layout, rule)
        warn_about_rounding(layout, rule)
        if not exact:
            check_reads_grad(base)
            warn_about_base(base, rule)

    @property
    @override
    def base(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._core.base

    @property
    def rule(self) -> Rule:
        """The rule that combines the gradients. A new one may have other groups and blocks."""
        return self._core.rule

    @rule.setter
    def rule(self, rule: Rule) -> None:
        for name in set(self._core.slots) - set(rule.groups):
            del self._core.slots[name]
        if rule.blocks != self._core.rule.blocks:
            self._core.layout = None
        self._core.rule = rule

    @property
    def mask(self) -> dict[Tensor, Tensor] | None:
        """For each tensor with a mask, a bool tensor that is True where a weight may move; None without a mask."""
        mask = self._core.mask
        return None if mask is None else {parameter: ~rest for parameter, rest in mask.rests.items()}

    @property
    def last_step(self) -> StepReport | None:
        """What the last combined step did; None before the first.

        One with numbers that are not finite reports NOT_FINITE; one that was refused or undone, what it was to do.
        """
        return self._core.last_step

    @contextmanager
    def retain(self) -> Iterator[None]:
        """Accumulate the retain gradient: `with optimizer.retain(): loss.backward()`."""
        self._core.notice_overflow()
        for parameter in self._core.parameters:
            if self._core.spent.is_spent(parameter):
                parameter.grad = None
        yield

    @contextmanager
    def forget(self) -> Iterator[None]:
        """Accumulate the forget gradient in its own slot: `with optimizer.forget(): loss.backward()`."""
        with self.group("forget"):
            yield

    @contextmanager
    def group(self, name: str) -> Iterator[None]:
        """Accumulate the gradient of one of the rule's groups: `with optimizer.group(name): loss.backward()`.

        Raises:
            HAMUValueError: If the rule does not know the group.
        """
        if name == self._core.rule.groups[0]:
            with self.retain():
                yield
            return
        slot = self._core.find_slot(name)
        self._core.notice_overflow()
        own_gradients_(self._core.parameters, self._core.spent)
        with slot.filling(self._core.parameters):
            yield

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Combine the gradients and let the base optimizer apply the result.

        Args:
            closure: Called first, with gradients enabled; it may compute one of the two gradients (Lightning does).

        Returns:
            What the closure returned, or None.

        Raises:
            HAMUStateError: If a gradient is missing. One objective alone is never applied.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._core.step()
        return result

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the retain gradient (inside `forget()` or `group(name)`: that one). The others are kept."""
        for slot in self._core.slots.values():
            if slot.is_open:
                slot.release()
        self._core.base.zero_grad(set_to_none)

    @property
    def aim(self) -> Aim:
        """Where the forget loss is and where it should go, for a rule with a `TargetQuota`."""
        return self.aim_of("forget")

    def aim_of(self, group: str) -> Aim:
        """Where the loss of a group is and where it should go, for a rule with a `TargetQuota` for it."""
        return self._core.find_aim(group)

    @property
    def has_forget_gradient(self) -> bool:
        """Whether a slot holds a gradient of the present step."""
        return self._core.is_filled

    def release_forget(self) -> None:
        """Drop the gradients of the present step, except the retain gradient."""
        for slot in self._core.slots.values():
            if slot.is_fresh:
                slot.release()

    def drop_step(self) -> None:
        """Give up a step whose forget gradient is there already, and count it."""
        self._core.drop_step()

    def unscale_forget_(self, scaler: torch.amp.GradScaler) -> None:
        """Divide the forget gradients by the loss scale, as `scaler.unscale_(optimizer)` does with the retain gradient.

        A non-finite forget gradient counts as an overflow: the scaler backs off at its next `update()`, and the
        combined step leaves itself out. (Not with `FineTune`, which does not use it.) After an overflow of the retain
        gradient the scaler does not call `step()`; the next `retain()` or `forget()` drops both gradients.

        Raises:
            HAMUStateError: If there is no forget gradient, or it is unscaled already.
        """
        core = self._core
        if not scaler.is_enabled():
            return
        core.notice_overflow()
        core.unscalings.check_can_begin(self.has_forget_gradient)
        retain = [p.grad for p in core.parameters]
        for name in [name for name, slot in core.slots.items() if slot.is_fresh]:
            with self.group(name):
                filled = [p for p in core.parameters if p.grad is not None]
                core.unscalings.add(Unscaling(scaler, filled, retain, tells=not core.rule.is_plain))

    def hamu_state_dict(self) -> dict[str, Any]:
        """Return our own state: the counters, the losses that targets need, and what the rule keeps."""
        return self._core.state_dict()

    def load_hamu_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `hamu_state_dict` returned."""
        self._core.load_state_dict(state_dict)

    @property
    @override
    def _counters(self) -> Counters:
        return self._core.counters

    @override
    def __repr__(self) -> str:
        return f"HAMUOptimizer({self.rule}, {self.base})"

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {"_core": self._core}
