"""Asks a rule what it would do, from the gradients of batch pairs, and never moves a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from hamu_lightning.callbacks._refusal import HAMUMisconfigurationError
from hamu_lightning.callbacks.forecast._report import PreflightReport, make_report
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.optim import Aim, HAMUOptimizer, NamedMasks, StepReport, hidden_gradients
from hamu_lightning.rules import Rule

if TYPE_CHECKING:
    pass


class Probe:
    """Asks the rule about gradients as they are, with the learning rates of an optimizer, and never moves a weight.

    Args:
        module: Whose weights they are.
        param_groups: Groups of the optimizer of the run. A learning rate of 0 (warm-up) is replaced by the schedule's
            `initial_lr`.
        rule: The rule.
        divisor: What each loss is divided by before its backward pass.
        mask: Which weights may move.
    """

    def __init__(
        self,
        module: nn.Module,
        param_groups: Sequence[Mapping[str, Any]],
        rule: Rule,
        divisor: int = 1,
        mask: NamedMasks | None = None,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(g["params"]), "lr": float(g["lr"]) or float(g.get("initial_lr", 0.0))} for g in param_groups
        ]
        if not any(group["lr"] for group in groups):
            raise HAMUValueError(
                "Expected a learning rate above 0 for the preflight, but all are 0. Start the schedule above 0, or "
                "call `hamu_lightning.preflight(..., lr=...)`."
            )
        # Plain SGD of its own: the base optimizer of the run and its state are not touched.
        self.optimizer = HAMUOptimizer(SGD(groups), rule, module.named_parameters(), mask=mask)
        self.optimizer.approve = lambda report: False
        self.forget, self.retain = self.optimizer.forget, self.optimizer.retain
        self._parameters = {id(p): p for group in groups for p in [*group["params"], *module.parameters()]}
        self._share = 1 / divisor
        self._quota = rule.target_quotas.get("forget")

    def take_aim(self, aim: Aim) -> None:
        """Ask for the same target, in the same number of steps, as the optimizer of the run."""
        own = self.optimizer.aim
        own.target, own.further, own.steps, own.taken, own.level, own.exchange = (
            aim.target,
            aim.further,
            aim.steps,
            aim.taken,
            aim.level,
            copy.deepcopy(aim.exchange),
        )

    def measure(
        self,
        forget: Callable[[], Tensor],
        retain: Callable[[], Tensor],
        pairs: int,
        target: float | None = None,
        raised: str = "forget loss",
    ) -> PreflightReport:
        """Measure so many batch pairs, and summarise them.

        Args:
            forget: Runs the next forget batch inside `self.forget()`, and returns its loss.
            retain: Likewise, inside `self.retain()`.
            pairs: How many.
            target: The forget loss to be reached; default: that of a `TargetQuota`.
            raised: What is raised on the forget data, in words.
        """
        rows: list[dict[str, float]] = []
        for _ in range(pairs):
            report, numbers = self._measure_pair(forget, retain)
            step = report.coefficients
            numbers["is_finite"] = step.is_finite & (numbers["retain_loss"] + numbers["forget_loss"]).isfinite()
            values = torch.stack([number.to(report.lr) for number in numbers.values()]).tolist()
            rows.append(dict(zip(numbers, values, strict=True)))
        bound = "forget" if step.constrained == 1 else "retain"
        # Nothing says yet in how many steps it is reached where something else than the loss is raised.
        if target is None and self._quota is not None and self.optimizer.aim.exchange is None:
            goal = self.optimizer.aim.goal
            target = float(self._quota.target if goal is None else goal)
        finite = [row for row in rows if row.pop("is_finite")]
        numbers_of_all = {"left_out": pairs - len(finite), "blocks": len(report.labels)}
        return make_report(finite, **numbers_of_all, target=target, bound=bound, raised=raised)

    def _measure_pair(
        self, forget: Callable[[], Tensor], retain: Callable[[], Tensor]
    ) -> tuple[StepReport, dict[str, Tensor]]:
        with hidden_gradients(self._parameters.values()):
            try:
                losses = {"forget_loss": forget(), "retain_loss": retain()}  # as in a fit: the forget pass first
                if self._quota is not None and self.optimizer.aim.exchange is None:
                    self.optimizer.aim.level = losses["forget_loss"].double()
                self.optimizer.plan_step("combine", window_shares=(self._share, self._share))
                self.optimizer.step()
            finally:
                self.optimizer.release_forget()
        report = self.optimizer.last_step
        assert report is not None
        return report, {**losses, **describe_step(report)}


def describe_step(report: StepReport) -> dict[str, Tensor]:
    """The numbers of one batch pair by name, 0-d each; see `PreflightReport`."""
    step = report.coefficients
    total, radius = step.gramian.sum(dim=0), step.radius.square().sum().sqrt()
    norms = total.diagonal().clamp(min=0).sqrt()
    bound, free = step.constrained, 1 - step.constrained
    share = step.total_quota / radius
    block_norms = step.gramian[:, bound, bound].clamp(min=0).sqrt()
    capacity = (step.radius * block_norms).sum()
    kappa_1, kappa_2 = report.thresholds
    return {
        "retain_norm": norms[0],
        "forget_norm": norms[1],
        "kappa": report.kappa.sum(),
        "kappa_1": -share * norms[free],
        "kappa_2": norms[free] * (norms[bound].square() - share.square()).clamp(min=0).sqrt(),
        "cosine": report.total_cosine,
        "conflicting_blocks": share_of(report.cosine > 0),
        "direct_blocks": share_of(report.kappa <= kappa_1),
        "damaging_blocks": share_of((report.kappa > kappa_2) & (report.kappa > 0)),
        "quota": step.total_quota,
        "largest_quota": capacity,
        "free_quota": step.feasible_improvement,
        "infeasible": (step.total_quota > capacity * (1 + 1e-9)).double(),
        "forget_improvement": step.forget_improvement,
        "retain_cost": -step.retain_improvement,
    }


def share_of(blocks: Tensor) -> Tensor:
    """The share of blocks `[B]`, bool, that are True."""
    return blocks.double().mean()


def check_two_groups(rule: Rule) -> None:
    """Raise unless the rule has one group to forget, and none to protect."""
    if len(rule.groups) != 2:
        raise HAMUMisconfigurationError(
            f"Expected a rule with one group to forget for the preflight, but it has the groups {rule.groups}. Call "
            "`hamu_lightning.preflight` with HAMUQ for one of them."
        )
