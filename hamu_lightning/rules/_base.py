"""What every rule takes: the base class `Rule`, and the Gramians that it is asked about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hamu_lightning.checks import check_type, describe
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import Blocks, widest_float
from hamu_lightning.rules._coefficients import GROUPS, Coefficients
from hamu_lightning.rules._quota import TargetQuota
from hamu_lightning.rules._radius import LearningRateRadius, Radius


class Rule(ABC):
    """Maps the Gramians of the retain and the forget gradient to coefficients: one unlearning method.

    A rule never sees a weight or a gradient. It reads nothing on the host and remembers nothing, unless it says so.
    """

    is_plain: ClassVar[bool] = False
    """Whether the step is the base optimizer's own step on the retain gradient: `HAMUOptimizer` then hands that
    gradient over as it was accumulated, at any learning rate, finite or not."""
    radius: Radius = LearningRateRadius()
    blocks: Blocks

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the gradients that the rule combines, retain first."""
        return GROUPS

    @property
    def target_quotas(self) -> Mapping[str, TargetQuota]:
        """The quotas that `HAMUOptimizer` resolves at each step, by group."""
        return {}

    def step_arguments(self, groups: tuple[str, ...], quotas: Mapping[str, Tensor]) -> dict[str, Any]:
        """The arguments of `coefficients` that change from step to step.

        Args:
            groups: The groups of this step.
            quotas: What was resolved of `target_quotas`, 0-d each.
        """
        return {"quota": quotas["forget"]} if quotas else {}

    def in_region(self, scale: float) -> Rule:
        """Return the rule with every radius multiplied by `scale`; a rule without a trust region returns itself."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule remembers from step to step, as a checkpoint can hold it; most remember nothing."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # noqa: B027  # nothing to load is the usual case
        """Load what `state_dict` returned."""

    @abstractmethod
    def coefficients(
        self,
        gramian: Tensor,
        *,
        lr: float | Tensor,
        weight_norms: Tensor | None = None,
        sizes: Tensor | None = None,
        quota: Tensor | None = None,
    ) -> Coefficients:
        """Compute the step of each block.

        Args:
            gramian: `[B, 2, 2]`, floating point, the inner products of the gradients in the order retain, forget.
            lr: The learning rate, a float or `[B]`. A block whose learning rate is 0 does not move.
            weight_norms: `[B]`, the L2 norms of the blocks' weights (only `RelativeRadius` needs them).
            sizes: `[B]`, the numbers of the blocks' weights (only `RelativeRadius` needs them).
            quota: 0-d, overrides the rule's own quota (loss units per step; it may be negative,
                see docs/method.md#closed-form).

        Returns:
            The coefficients, and what they promise.

        Raises:
            HAMUValueError: If an argument has the wrong shape or type, or one that the radius needs is missing.
        """


def check_gramian(gramian: Tensor, groups: Sequence[str] | None = None) -> None:
    """Raise unless a tensor can be the Gramians of a step.

    Args:
        gramian: Should have the shape `[B, n, n]`, and the dtype float32 or float64.
        groups: The names of its rows; None for the two gradients, retain and forget.

    Raises:
        HAMUValueError: If it has another shape or dtype.

    Example:
        >>> check_gramian(torch.ones(3, 2, 2))
        >>> check_gramian(torch.ones(3, 3, 3), ["retain", "alice", "bob"])
    """
    n = 2 if groups is None else len(groups)
    check_type("gramian", gramian, Tensor, f"a tensor of shape [B, {n}, {n}]", "`compute_gramian` makes it.")
    if gramian.ndim != 3 or len(gramian) == 0 or gramian.shape[1:] != (n, n):
        rows, grads = "", "retain_grads, forget_grads"
        if groups is not None:
            rows, grads = f", one row for each of {list(groups)}", "*grads"
        raise HAMUValueError(
            f"Expected `gramian` to have shape [B, {n}, {n}]{rows}, but got {list(gramian.shape)}. "
            f"`compute_gramian({grads})` makes it."
        )
    if not gramian.is_floating_point() or gramian.dtype.itemsize < 4:
        raise HAMUValueError(
            f"Expected `gramian` to be float32 or float64, but got {gramian.dtype}. "
            "Squares of gradients overflow in narrower types; `compute_gramian` sums in float32 or wider."
        )


def as_wide(value: float | Tensor, gramian: Tensor, name: str = "lr") -> Tensor:
    """Return a number, such as a learning rate, in the dtype that rules compute in, next to the Gramian.

    Args:
        value: A number, or a tensor of shape `[]` or `[B]`.
        gramian: `[B, n, n]`, on the device.
        name: The argument's name, as its caller knows it.

    Returns:
        A tensor of the same shape on that device: float64, or float32 where the device has no float64.

    Raises:
        HAMUValueError: If it is neither.

    Example:
        >>> as_wide(0.5, torch.ones(1, 2, 2))
        tensor(0.5000, dtype=torch.float64)
    """
    try:
        wide = torch.as_tensor(value, dtype=widest_float(gramian.device), device=gramian.device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise HAMUValueError(f"Expected `{name}` to be a number or a tensor, but got {describe(value)}.") from error
    if wide.shape not in ((), gramian.shape[:1]):
        raise HAMUValueError(
            f"Expected `{name}` to be one number or [{len(gramian)}], one for each block, but got {describe(value)}."
        )
    return wide
