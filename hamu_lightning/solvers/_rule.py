"""The rule for n groups: several requests to forget, several groups to protect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from hamu_lightning.checks import check_choice, check_type, describe, store
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import Blocks, check_blocks
from hamu_lightning.rules import (
    Branch,
    LearningRateRadius,
    OnInfeasible,
    Quota,
    Radius,
    Rule,
    ScaledRadius,
    TargetQuota,
    as_quota,
    check_gramian,
    check_quota,
    check_radius,
)
from hamu_lightning.solvers._backend import Backend
from hamu_lightning.solvers._ball import QPSolution, SolveStatus
from hamu_lightning.solvers._pose import Posed, compute_capacity, pose_blocks, pose_global, tabulate
from hamu_lightning.solvers._problem import search
from hamu_lightning.solvers._projection import Array
from hamu_lightning.solvers._result import Account, GroupCoefficients
from hamu_lightning.solvers._together import run_searches
from hamu_lightning.solvers._transfer import to_device, to_host
from hamu_lightning.tolerances import SMALLEST_SINE, compute_rounding

RETAIN = "retain"


@dataclass(frozen=True)
class FeasibleDirection(Rule):
    """Serve several requests to forget at once, protect named groups, and spare the retain loss as far as that allows.

    Solves, to first order (docs/method.md#groups, eq. 7.1; HAMU-Q of Chen et al. 2026 is the case of one request and
    no protection):

        minimise g_r·d   subject to   g_i·d >= Q_i,   g_j·d <= -U_j,   |d| <= R

    One step goes like this:

    1. The Gramian, the radii and the quotas are copied to the host, packed.
    2. The gradients are divided by their lengths and written in an orthonormal basis of what they span.
    3. Newton's method finds the active constraints; where it goes in circles, quadratic programs do, solved through
       qpsolvers. They give the step in closed form, which is taken only if its optimality conditions hold.
    4. If no step inside the radius serves all constraints: see `on_infeasible`.
    5. The coefficients and what they promise are copied back, packed.

    It holds no memory: the same numbers give the same step, bit by bit.

    Args:
        quota: For each request by name Q_i, the rise of its loss per step: loss units, not negative; or a
            `RelativeQuota`, or a `TargetQuota`.
        floor: For each protected group by name U_j, the fall of its loss per step, loss units, not negative. 0: it must
            not rise.
        radius: R of each block, L2 length in weight space per step. The whole model may move by their L2 norm.
        blocks: "global" is one problem for the whole model. Otherwise ("tensor", "layer", a function) one for each
            block; quotas and floors are shared by capacity.
        on_infeasible: Where no step inside the radius serves all constraints: "best_effort" violates the floors as
            little as possible, then the quotas (sum of squares, in shares of what the radius allows for each), and
            among the steps that do so takes the best for retain; "skip" rests. If no request has a gradient, it rests.
        solver: The name of an installed solver of qpsolvers.

    Raises:
        HAMUValueError: If an argument is out of its range, or the solver is not installed.

    Example:
        >>> import torch
        >>> rule = FeasibleDirection({"alice": 0.02, "bob": 0.01}, {"rare": 0.0})
        >>> rule.groups
        ('retain', 'rare', 'alice', 'bob')
        >>> step = rule.coefficients(torch.eye(4, dtype=torch.float64).unsqueeze(0), lr=0.1)
        >>> float(step.improvements["alice"]), float(step.improvements["bob"])
        (0.02, 0.01)
    """

    quota: Mapping[str, float | Quota]
    floor: Mapping[str, float] = field(default_factory=dict)
    _: KW_ONLY
    radius: Radius = LearningRateRadius()
    blocks: Blocks = "global"
    on_infeasible: OnInfeasible = "best_effort"
    solver: str = "osqp"

    def __post_init__(self) -> None:
        """Check the settings; the mappings are copied."""
        _check_names(self.quota, self.floor)
        floor = {name: check_quota(f"floor[{name!r}]", number) for name, number in self.floor.items()}
        quota = {
            name: quota if isinstance(quota, Quota) else check_quota(f"quota[{name!r}]", quota)
            for name, quota in self.quota.items()
        }
        check_radius(self.radius)
        check_choice("on_infeasible", self.on_infeasible, get_args(OnInfeasible))
        check_blocks(self.blocks)
        Backend(self.solver)
        store(self, quota=quota, floor=floor)

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the Gramian's rows in their order: "retain", the protected groups, the forget groups."""
        return (RETAIN, *self.floor, *self.quota)

    @property
    def target_quotas(self) -> dict[str, TargetQuota]:
        """The quotas that must be resolved at each step, by name."""
        return {name: quota for name, quota in self.quota.items() if isinstance(quota, TargetQuota)}

    def step_arguments(self, groups: tuple[str, ...], quotas: Mapping[str, Tensor]) -> dict[str, Any]:
        """The groups of this step, and what was resolved of their target quotas."""
        return {"groups": groups, "quota": {name: quota for name, quota in quotas.items() if name in groups}}

    def in_region(self, scale: float) -> FeasibleDirection:
        """Return the rule with every radius multiplied by `scale`."""
        return replace(self, radius=ScaledRadius(self.radius, scale))

    def coefficients(
        self,
        gramian: Tensor,
        *,
        lr: float | Tensor,
        weight_norms: Tensor | None = None,
        sizes: Tensor | None = None,
        quota: Tensor | Mapping[str, Tensor] | None = None,
        groups: Sequence[str] | None = None,
    ) -> GroupCoefficients:
        """Compute the step.

        Args:
            gramian: `[B, n, n]`, floating point, in the order of `groups`.
            lr: The learning rate, a float or `[B]`. A block whose learning rate is 0 does not move.
            weight_norms: `[B]`, the L2 norms of the blocks' weights (only `RelativeRadius` needs them).
            sizes: `[B]`, the numbers of the blocks' weights (only `RelativeRadius` needs them).
            quota: For some forget groups by name a 0-d tensor that overrides the quota: what `TargetQuota.resolve`
                gave. It may be negative (the loss may fall by at most that), or -inf (no constraint). With a single
                forget group the tensor itself will do.
            groups: The names of the Gramian's rows, if some of `self.groups` are left out; in the same order.

        Returns:
            The coefficients, and what they promise.

        Raises:
            HAMUValueError: If an argument has the wrong shape or type, or a name is unknown.
        """
        names = self._check_groups(groups)
        check_gramian(gramian, names)
        given = self._check_given(quota, names)
        known = {"gramian": gramian, "lr": _as_tensor(lr), "weight_norms": weight_norms, "sizes": sizes}
        known |= {f"quota {name}": _as_tensor(number) for name, number in given.items()}
        present = {name: tensor for name, tensor in known.items() if tensor is not None}
        host = dict(zip(present, to_host(list(present.values()), gramian.device), strict=True))
        posed, is_finite = self._pose(host, names, max(compute_rounding(gramian.dtype), SMALLEST_SINE**2))
        problems = posed.make_problems()
        searches = [search(problem, self.on_infeasible == "best_effort") for problem in problems]
        solutions = run_searches(searches, Backend(self.solver))
        table = tabulate(posed, problems, solutions)
        if not is_finite:
            _mark_not_finite(table)
        capacity = compute_capacity(posed.gramians, posed.radii)[posed.can_move]
        return _make_coefficients(
            dict(zip(table, to_device(list(table.values()), gramian.device), strict=True)),
            gramian,
            names,
            posed.n_floors,
            tuple(solutions),
            Account(tuple(problems), capacity, posed.bounds),
        )

    def _pose(self, host: dict[str, Tensor], names: tuple[str, ...], threshold: float) -> tuple[Posed, bool]:
        """The step's numbers, and whether they are finite; where not, they are replaced by zeros, and nothing moves."""
        gramian = host["gramian"]
        is_finite = bool(gramian.isfinite().all())
        gramian = gramian if is_finite else torch.zeros_like(gramian)
        lr = host["lr"].expand(gramian.shape[0])
        radius = self.radius.compute(
            gramian[:, 0, 0].clamp(min=0).sqrt(), lr, host.get("weight_norms"), host.get("sizes")
        )
        is_finite = is_finite and bool(radius.isfinite().all())
        radius = torch.where(lr != 0, radius, 0) if is_finite else torch.zeros_like(radius)
        blocks, radii = gramian.numpy(), radius.numpy()
        moves = (lr != 0).numpy() & is_finite
        pose = pose_global(blocks, radii, moves) if self.blocks == "global" else pose_blocks(blocks, radii)
        bounds = self._compute_bounds(compute_capacity(*pose[:2]).sum(axis=0), host, names)
        if np.isnan(bounds).any() or (bounds == np.inf).any():
            is_finite, radii, moves, bounds = False, 0 * radii, moves & False, np.zeros_like(bounds)
            pose = (pose[0], 0 * pose[1], pose[2])
        n_floors = sum(name in self.floor for name in names)
        return Posed(*pose, blocks, radii, moves, n_floors, threshold, bounds), is_finite

    def _compute_bounds(self, capacity: Array, host: dict[str, Tensor], names: tuple[str, ...]) -> Array:
        """`[n-1]`, the floors and the quotas, loss units per step."""
        bounds = []
        for name, most in zip(names[1:], torch.from_numpy(capacity[1:]).unbind(), strict=True):
            if name in self.floor:
                bounds.append(self.floor[name])
            else:
                bounds.append(float(as_quota(self.quota[name]).compute(most, host.get(f"quota {name}"))))
        return np.array(bounds, dtype=float)

    def _check_groups(self, groups: Sequence[str] | None) -> tuple[str, ...]:
        names = self.groups if groups is None else tuple(groups)
        if names[:1] != (RETAIN,) or names != tuple(name for name in self.groups if name in names):
            raise HAMUValueError(
                f"Expected `groups` to be some of {list(self.groups)}, 'retain' among them and in this order, but got "
                f"{list(names)}."
            )
        return names

    def _check_given(self, quota: Tensor | Mapping[str, Tensor] | None, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The overriding quotas of the groups that are present."""
        if isinstance(quota, Tensor):
            if len(self.quota) > 1:
                raise HAMUValueError(
                    f"Expected `quota` to map names to tensors, since there are {len(self.quota)} forget groups, but "
                    "got one tensor."
                )
            quota = {next(iter(self.quota)): quota}
        unknown = [name for name in quota or {} if name not in self.quota]
        if unknown:
            raise HAMUValueError(f"Expected `quota` to name forget groups, {list(self.quota)}, but got {unknown[0]!r}.")
        return {name: number for name, number in (quota or {}).items() if name in names}


def _check_names(quota: Mapping[str, object], floor: Mapping[str, object]) -> None:
    check_type("quota", quota, Mapping, "a dict of quotas by name", "FeasibleDirection({'forget': 1e-3}) has one.")
    check_type("floor", floor, Mapping, "a dict of floors by name")
    if not quota:
        raise HAMUValueError("Expected `quota` to name at least one forget group, but got none.")
    for name in (*floor, *quota):
        if not isinstance(name, str) or name in ("", RETAIN):
            raise HAMUValueError(
                f"Expected the names of groups to be strings, not empty and not 'retain', but got {describe(name)}."
            )
    both = sorted(set(quota) & set(floor))
    if both:
        raise HAMUValueError(
            f"Expected each group to be forgotten or protected, but got {both[0]!r} in `quota` and in `floor`."
        )


def _make_coefficients(
    table: dict[str, Tensor],
    gramian: Tensor,
    names: tuple[str, ...],
    n_floors: int,
    solutions: tuple[QPSolution, ...],
    account: Account,
) -> GroupCoefficients:
    """Make the result from what was copied back."""
    return GroupCoefficients(
        values=table["values"],
        branch=table["branch"].long(),
        quota=table["quota"],
        total_quota=table["total"][0],
        radius=table["radius"],
        block_feasible=table["block_feasible"] > 0,
        gramian=torch.where(gramian.isfinite().all(), gramian, 0).to(table["values"].dtype),
        groups=names,
        n_protected=n_floors,
        group_quota=table["group_quota"],
        multipliers=dict(zip(names[1:], table["multipliers"].unbind(dim=1), strict=True)),
        status=table["status"].long(),
        costs=table["costs"],
        retain_costs=table["retain_costs"],
        solutions=solutions,
        account=account,
    )


def _as_tensor(number: float | Tensor) -> Tensor:
    return number if isinstance(number, Tensor) else torch.tensor(number, dtype=torch.float64)


def _mark_not_finite(table: dict[str, Array]) -> None:
    """Nothing was solved: say why."""
    table["status"][:] = SolveStatus.NOT_FINITE
    table["branch"][:] = Branch.NOT_FINITE
    table["block_feasible"][:] = 0
