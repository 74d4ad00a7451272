"""Which base optimizers can be wrapped, and what is said about them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import LBFGS, SGD, Optimizer

from hamu_lightning.checks import describe
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.optim._layout import Layout
from hamu_lightning.rules import Rule


def is_at_rest(param_groups: Sequence[dict[str, Any]]) -> bool:
    """Whether every learning rate is a plain 0. One that is a tensor is not read: the rule sees to it."""
    return all(isinstance(group["lr"], float | int) and group["lr"] == 0 for group in param_groups)


def is_plain_sgd(base: Optimizer) -> bool:
    """Whether the optimizer moves the weights by exactly `-lr` times the gradient."""
    return type(base) is SGD and not any(group["momentum"] or group["weight_decay"] for group in base.param_groups)


def check_base(base: Optimizer) -> None:
    """Raise unless the optimizer can be wrapped."""
    if not isinstance(base, Optimizer):
        raise HAMUValueError(f"Expected `base` to be a torch.optim.Optimizer, but got {type(base).__name__}.")
    if type(base).__module__.partition(".")[0] == "accelerate":
        raise HAMUValueError(
            "Expected `base` to be a plain optimizer, but got one that Accelerate has prepared, which leaves out steps "
            "where we cannot see it. Wrap it before `accelerator.prepare`, and prepare the HAMUOptimizer."
        )
    if isinstance(base, LBFGS):
        raise HAMUValueError(
            "Expected `base` to take one gradient per step, but got LBFGS, which evaluates its closure several times. "
            "Use SGD, AdamW or another first-order optimizer."
        )
    for group in base.param_groups:
        check_group(base, group)


def check_group(base: Optimizer, group: Mapping[str, Any]) -> None:
    """Raise unless a parameter group, or what is to become one, can be used; `base` has the defaults."""
    settings = {**base.defaults, **group}
    if "lr" not in settings:
        raise HAMUValueError("Expected each parameter group of `base` to have a learning rate 'lr', but one has none.")
    if settings["lr"] is None:
        raise HAMUValueError(
            f"Expected each parameter group of `base` to have a learning rate, but that of {type(base).__name__} is "
            "None: it finds the size of its steps by itself, and no rule can know how far they go. Give it a learning "
            "rate, such as lr=1e-3 (with Adafactor also relative_step=False)."
        )
    if settings.get("maximize"):
        raise HAMUValueError(
            f"Expected `maximize=False`, but a parameter group of {type(base).__name__} has maximize=True. "
            "The rule already gives the direction of both objectives."
        )


def check_reads_grad(base: Optimizer) -> None:
    """Raise where the weights have gradients beside `.grad`, which the optimizer is likely to read instead."""
    tensors = [p for group in base.param_groups for p in group["params"]]
    found = next((name for name in ("grad_sample", "main_grad") for p in tensors if hasattr(p, name)), None)
    if found is not None:
        raise HAMUValueError(
            f"Expected {type(base).__name__} to read `.grad`, but the weights also have `{found}`, where the gradients "
            "of both passes mix and a combined one never arrives. Train without it here, or set `exact=True`, which "
            "takes the learning rates from the optimizer and nothing else (no clipping or noise per sample)."
        )


def check_can_move(layout: Layout, rule: Rule) -> None:
    """Raise unless some weight may move, and has a radius to move in."""
    if layout.mask is not None and not any(layout.sizes):
        raise HAMUValueError(
            "Expected some weight inside of `mask`, but all rest. True lets a weight move; is the mask inverted?"
        )
    if rule.radius.needs_weights and not any(bool(w.any()) for w in layout.weights):
        raise HAMUValueError(
            f"Expected some weight to differ from zero with {rule.radius}, but all are zero. "
            "A radius relative to the weights needs weights: use FixedRadius, or load the trained model first."
        )
    rule.radius.check(layout)


def check_all_present(groups: Sequence[str], is_there: Sequence[bool]) -> None:
    """Raise unless the gradient of each group is there."""
    missing = [name for name, found in zip(groups, is_there, strict=True) if not found]
    if not missing:
        return
    what = f"{' and '.join(missing)} gradient" + (" is" if len(missing) == 1 else "s are")
    doors = [f"`with optimizer.{name}():`" for name in groups]
    if tuple(groups) != ("retain", "forget"):
        doors = ["`with optimizer.group(name):`"]
    raise HAMUStateError(
        f"Expected the gradients of {' and '.join(groups)} at `step()`, but the {what} missing. Run "
        f"each objective's backward() inside {' and '.join(doors)} before every step."
    )


def check_sketch(rule: Rule, needs_gradients: bool) -> None:
    """Raise unless projections will do in place of the gradients."""
    if rule.blocks != "global" or needs_gradients:
        raise HAMUValueError(
            "Expected `sketch` to go with a rule for blocks='global', and without `track_actual`, `reuse_groups` and "
            f"`mask`, but got {describe(rule)}: projections of many blocks take more memory than they save, and "
            "the others need the gradients. FeasibleDirection has global blocks by default."
        )


def warn_about_rounding(layout: Layout, rule: Rule) -> None:
    """Warn where steps may be lost in the rounding of the weights."""
    if layout.rounds and not rule.is_plain:
        kinds = sorted({str(p.dtype).removeprefix("torch.") for p in layout.parameters if p.dtype.itemsize < 4})
        warnings.warn(
            f"The weights are {', '.join(kinds)}: a step that moves a weight by less than half the distance to the "
            "next number (in bfloat16 0.2 to 0.4 % of it) is rounded away, and its promise with it. Keep the weights "
            "in float32: Trainer(precision='bf16-mixed'), or '16-mixed'.",
            stacklevel=3,
        )


def warn_about_base(base: Optimizer, rule: Rule) -> None:
    """Warn, by name, about what makes the weights move by something else than `d`."""
    if rule.is_plain or is_plain_sgd(base):
        return
    reasons = [
        f"{name}={group[name]}"
        for name in ("momentum", "weight_decay")
        for group in base.param_groups
        if group.get(name)
    ]
    reasons = list(dict.fromkeys(reasons)) or [f"{type(base).__name__} rescales gradients"]
    warnings.warn(
        f"The base optimizer {type(base).__name__} has {', '.join(reasons)}: the weights will not move by exactly the "
        "step that the rule chose, so quota and radius hold for the gradient it receives, not for the weights. "
        "`exact=True` applies the step itself, `track_actual=True` measures what the weights did; or use plain SGD.",
        stacklevel=3,
    )
