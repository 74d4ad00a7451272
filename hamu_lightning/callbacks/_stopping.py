"""When unlearning should end by itself, and in which words that is said."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from hamu_lightning.optim import StepReport

StopOn: TypeAlias = Literal["collateral_damage", "infeasible"]

# A predicted improvement this close to the quota has met it: the closed form is exact to rounding.
_SHORTFALL = 1e-6


def find_stop_reason(report: StepReport, stop_on: tuple[StopOn, ...]) -> str | None:
    """Tell, before a step is applied, why it should not be: None to go on.

    Reads one packed tensor on the host.

    Args:
        report: What the rule chose.
        stop_on: "collateral_damage" stops when the quota exceeds what any step can give without harm (DESIGN 1.4),
            "infeasible" when the step cannot give the quota inside its trust region.

    Returns:
        The reason in words, or None.
    """
    step = report.coefficients
    given = step.forget_improvement if step.constrained == 1 else step.retain_improvement
    numbers = torch.stack((step.total_quota, step.feasible_improvement, given))
    quota, feasible, improvement = numbers.tolist()
    bound, other = ("forget", "retain") if step.constrained == 1 else ("retain", "forget")
    if "infeasible" in stop_on and improvement < quota * (1 - _SHORTFALL):
        return (
            f"infeasible: the quota asks for a {bound} improvement of {quota:.4g} per step, but the trust region "
            f"allows {improvement:.4g}. Lower the quota or enlarge the radius."
        )
    if "collateral_damage" in stop_on and feasible < quota:
        return (
            f"collateral damage: the quota asks for a {bound} improvement of {quota:.4g} per step, but no step inside "
            f"the trust region gives more than {feasible:.4g} without harm to the {other} loss. Lower the quota, "
            "enlarge the radius, or accept the model reached."
        )
    return None
