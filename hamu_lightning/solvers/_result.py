"""What a step for several groups promises, and what each request and each protection costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from hamu_lightning.rules import Coefficients
from hamu_lightning.solvers._ball import QPSolution
from hamu_lightning.solvers._diagnosis import compute_feasible_improvement, find_conflict
from hamu_lightning.solvers._problem import GroupProblem
from hamu_lightning.solvers._projection import Array


class Account(NamedTuple):
    """What the host knows of a step, kept for questions that are seldom asked.

    Args:
        problems: The problems that were solved; those without a radius are left out.
        capacity: `[P', n]`, `R |g_k|` of each of them and each group, loss units per step.
        bounds: `[n-1]`, floors and quotas of the whole step, loss units.
    """

    problems: tuple[GroupProblem, ...]
    capacity: Array
    bounds: Array


@dataclass(frozen=True, eq=False)
class GroupCoefficients(Coefficients):
    """The step that `FeasibleDirection` chose for n groups, and what it promises to first order.

    `P` is the number of problems: 1 for `blocks="global"`, else the number of blocks. The constraints are numbered in
    the order of `groups[1:]`: the protected groups, then the forget groups.

    Args:
        values: `[B, n]`, float64: the change of the weights is `d = sum_k values[:, k] g_k`.
        branch: `[B]`, codes of `Branch`: DIRECT where no constraint is active, RECTIFIED where some are, INFEASIBLE,
            NO_RADIUS, NOT_FINITE. A block whose solve failed counts as INFEASIBLE, and rests; see `status`.
        quota: `[B]`, the forget quotas together, shared among the blocks by capacity.
        total_quota: 0-d, the sum of the forget quotas.
        radius: `[B]`, L2 lengths in weight space; 0 where the learning rate is.
        block_feasible: `[B]`, bool.
        gramian: `[B, n, n]`.
        groups: The names of the rows: "retain", the protected groups, the forget groups.
        n_protected: How many groups are protected.
        group_quota: `[P, n-1]`, the right-hand sides: floors and quotas of each problem, loss units per step.
        multipliers: For each constraint by name `[P]`, not negative: by how much the optimal `g_r·d` rises (the retain
            loss falls less) per unit of that floor or quota. Retain loss units per loss unit of the constraint's group.
            Infinite where the constraints need the whole radius, NaN where the problem was not solved to optimality.
        status: `[P]`, codes of `SolveStatus`.
        costs: `[P, n_protected, n_forget]`: how much of each floor's multiplier each request causes, in the unit of the
            multiplier. It may be negative: a request can make protection cheaper. NaN where the multiplier is infinite.
        retain_costs: `[P, n_protected]`, the rest of the multiplier: what retain's own step and the floors cause.
        solutions: The solver's answers, on the host.
        account: What the host knows of the step.

    Example:
        >>> import torch
        >>> from hamu_lightning.rules import FixedRadius
        >>> from hamu_lightning.solvers import FeasibleDirection
        >>> rule = FeasibleDirection({"alice": 0.6}, {"rare": 0.0}, radius=FixedRadius(1.0))
        >>> step = rule.coefficients(torch.eye(3, dtype=torch.float64)[None], lr=0.1)
        >>> step.improvements["retain"], step.improvements["alice"]
        (tensor(0.8000, dtype=torch.float64), tensor(0.6000, dtype=torch.float64))
        >>> step.conflict()
        ()
    """

    groups: tuple[str, ...] = field(kw_only=True)
    n_protected: int = field(kw_only=True)
    group_quota: Tensor = field(kw_only=True)
    multipliers: dict[str, Tensor] = field(kw_only=True)
    status: Tensor = field(kw_only=True)
    costs: Tensor = field(kw_only=True)
    retain_costs: Tensor = field(kw_only=True)
    solutions: tuple[QPSolution, ...] = field(kw_only=True, repr=False)
    account: Account = field(kw_only=True, repr=False)

    @property
    def forgotten(self) -> tuple[str, ...]:
        """The names of the groups whose loss is to rise."""
        return self.groups[1 + self.n_protected :]

    def count_as_served(self, changes: Tensor) -> Tensor:
        """Changes of the losses `[n]`, counted positive where they serve: kept losses fall, forgotten ones rise."""
        kept = 1 + self.n_protected
        return torch.cat((-changes[:kept], changes[kept:]))

    @cached_property
    def pair_gramian(self) -> Tensor:
        """`[B, 2, 2]`, the Gramians of retain and of the sum of all that is to be forgotten."""
        pair = self.gramian.new_zeros(2, len(self.groups))
        pair[0, 0] = 1
        pair[1, 1 + self.n_protected :] = 1
        return pair @ self.gramian @ pair.T

    @cached_property
    def forget_improvement(self) -> Tensor:
        """Predicted rise of the forget losses together, 0-d."""
        return sum((self.improvements[name] for name in self.forgotten), torch.zeros_like(self.total_quota))

    @cached_property
    def feasible_improvement(self) -> Tensor:
        """The most forgetting, in the proportion of the quotas, that does not raise the retain loss, 0-d.

        The largest theta such that some step gives theta times each quota, serves the floors and does not raise the
        retain loss, times the sum of the quotas (docs/method.md#certificates, eq. 6.7). 0 where nothing can move.
        Computed when asked.
        """
        bound = compute_feasible_improvement(*self.account, self.n_protected)
        return torch.full_like(self.total_quota, bound)

    @property
    def is_served(self) -> Tensor:
        """Whether all quotas and floors are served, 0-d, bool."""
        return self.block_feasible.all()

    def conflict(self) -> tuple[str, ...]:
        """Return a smallest set of constraints, by name, without which the step is feasible; empty if it is.

        Exact up to three constraints; beyond, a set of which none can be spared. Computed on the host when asked.
        """
        return tuple(self.groups[1 + number] for number in find_conflict(self.account.problems))

    def summary(self) -> dict[str, Tensor]:
        """As for two groups, and for each group what is asked, what is promised, and its multiplier (mean over `P`)."""
        numbers = super().summary()
        for index, name in enumerate(self.groups[1:]):
            numbers[f"quota/{name}"] = self.group_quota[:, index].sum()
            numbers[f"improvement/{name}"] = self.improvements[name]
            numbers[f"multiplier/{name}"] = self.multipliers[name].mean()
        return numbers
