"""What every rule answers: the result `Coefficients`, and the enum `Branch`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from hamu_lightning.rules._certificate import compute_feasible_improvement

RETAIN, FORGET = 0, 1
GROUPS: tuple[str, ...] = ("retain", "forget")
# A predicted improvement this close to the quota has met it: the closed form is exact to rounding.
_SHORTFALL = 1e-6


class Branch(IntEnum):
    """Which case of the closed form a block took (docs/method.md#closed-form).

    For HAMU-U the two objectives change places: NO_RETAIN_SIGNAL then says that the forget gradient is zero (nothing to
    gain), NO_FORGET_SIGNAL that the retain gradient is zero (the quota cannot be served).
    """

    DIRECT = 0
    """The plain step meets the quota already."""
    RECTIFIED = 1
    """The step was turned until it meets the quota, at the full radius."""
    COLLINEAR = 2
    """The two gradients are parallel: the step gives exactly the quota."""
    NO_RETAIN_SIGNAL = 3
    """The retain gradient is zero: the smallest step that meets the quota."""
    NO_FORGET_SIGNAL = 4
    """The forget gradient is zero but the quota is positive: infeasible, the block rests."""
    NO_RADIUS = 5
    """The radius is zero: the block rests."""
    INFEASIBLE = 6
    """The quota exceeds what the radius allows: `on_infeasible` was applied."""
    NOT_FINITE = 7
    """A number in the Gramians is not finite: no block moves."""


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The step that a rule chose, block by block, and what it promises to first order.

    All tensors stay on the device; nothing is read until somebody looks. Improvements are in loss units per step,
    positive when the objective is served: the forget loss rises, the retain loss falls.

    Args:
        values: `[B, 2]`, float64: the change of the weights is `d = values[:, 0] g_r + values[:, 1] g_f`.
        branch: `[B]`, int64, the codes of `Branch`.
        quota: `[B]`, what is asked of each block, loss units per step. (With the "optimal" allocation: what it gives.)
        total_quota: 0-d, what is asked of the whole step.
        radius: `[B]`, the longest step of each block, L2 length in weight space.
        block_feasible: `[B]`, bool, whether the block can give its quota inside its radius.
        gramian: `[B, 2, 2]`, float64, the Gramians that the step was computed from.
        constrained: The objective that the quota is about: 1 (forget, HAMU-Q) or 0 (retain, HAMU-U).

    Example:
        >>> import torch
        >>> from hamu_lightning.rules import HAMUQ, FixedRadius
        >>> gramian = torch.eye(2, dtype=torch.float64).expand(1, 2, 2)
        >>> step = HAMUQ(0.6, radius=FixedRadius(1.0)).coefficients(gramian, lr=0.1)
        >>> step.values
        tensor([[-0.8000,  0.6000]], dtype=torch.float64)
        >>> step.forget_improvement, step.retain_improvement, step.margin
        (tensor(0.6000, dtype=torch.float64), tensor(0.8000, dtype=torch.float64), tensor(0.4000, dtype=torch.float64))
    """

    values: Tensor
    branch: Tensor
    quota: Tensor
    total_quota: Tensor
    radius: Tensor
    block_feasible: Tensor
    gramian: Tensor
    constrained: int = FORGET
    # The names of the gradients, in the order of the Gramian; not a field, since two-gradient rules have no choice.
    groups = GROUPS

    @staticmethod
    def without_quota(gramian: Tensor, values: Tensor) -> Coefficients:
        """Make the result of a method that has neither a quota nor a trust region.

        It reports a quota of 0, which every block gives, and the length of each block's step as its radius.

        Args:
            gramian: `[B, 2, 2]`, float64.
            values: `[B, 2]`, float64: the step is `d = values[:, 0] g_r + values[:, 1] g_f`. Where one of these numbers
                is not finite, no block moves.

        Returns:
            The coefficients, and what they promise.

        Example:
            >>> gramian = torch.eye(2, dtype=torch.float64).expand(1, 2, 2)
            >>> step = Coefficients.without_quota(gramian, torch.tensor([[-0.6, 0.8]], dtype=torch.float64))
            >>> step.radius, step.forget_improvement
            (tensor([1.], dtype=torch.float64), tensor(0.8000, dtype=torch.float64))
        """
        square = ((gramian @ values.unsqueeze(2)).squeeze(2) * values).sum(dim=1)  # [B]: |d|^2
        is_finite = gramian.isfinite().all() & values.isfinite().all()
        radius = torch.where(is_finite, square.clamp(min=0).sqrt(), 0)
        return Coefficients(
            values=torch.where(is_finite, values, 0),
            branch=torch.where(is_finite, int(Branch.DIRECT), int(Branch.NOT_FINITE)).expand(radius.shape),
            quota=torch.zeros_like(radius),
            total_quota=torch.zeros_like(radius[0]),
            radius=radius,
            block_feasible=is_finite.expand(radius.shape),
            gramian=torch.where(is_finite, gramian, 0),
        )

    @cached_property
    def pair_gramian(self) -> Tensor:
        """`[B, 2, 2]`, the Gramians of retain and of the sum of all that is to be forgotten."""
        return self.gramian

    @property
    def forgotten(self) -> tuple[str, ...]:
        """The names of the groups whose loss is to rise."""
        return GROUPS[FORGET:]

    def count_as_served(self, changes: Tensor) -> Tensor:
        """Changes of the losses `[n]`, counted positive where they serve: kept losses fall, forgotten ones rise."""
        return torch.stack((-changes[RETAIN], changes[FORGET]))

    @cached_property
    def improvements(self) -> dict[str, Tensor]:
        """Predicted improvement of each group, 0-d each, loss units per step."""
        changes = (self.values.unsqueeze(1) * self.gramian).sum(dim=(0, 2))
        return dict(zip(self.groups, self.count_as_served(changes).unbind(), strict=True))

    @property
    def is_finite(self) -> Tensor:
        """Whether all numbers that the step was computed from are finite, 0-d, bool. If not, no block moves."""
        return (self.branch != int(Branch.NOT_FINITE)).all()

    @cached_property
    def forget_improvement(self) -> Tensor:
        """Predicted rise of the forget loss, `g_f·d` summed over the blocks, 0-d."""
        return (self.values * self.gramian[:, :, FORGET]).sum()

    @cached_property
    def retain_improvement(self) -> Tensor:
        """Predicted fall of the retain loss, `-g_r·d` summed over the blocks, 0-d."""
        return -(self.values * self.gramian[:, :, RETAIN]).sum()

    @cached_property
    def feasible_improvement(self) -> Tensor:
        """The most that any step inside the radii can give without harm to the other objective, 0-d.

        See docs/method.md#certificates, eq. 6.4.
        """
        gramian = self.gramian if self.constrained == FORGET else exchange_objectives(self.gramian)
        return compute_feasible_improvement(gramian, self.radius)

    @cached_property
    def margin(self) -> Tensor:
        """`feasible_improvement` minus the total quota, 0-d: negative when the step *must* harm the other objective."""
        return self.feasible_improvement - self.total_quota

    @property
    def is_served(self) -> Tensor:
        """Whether the step gives what was asked, 0-d, bool."""
        given = self.forget_improvement if self.constrained == FORGET else self.retain_improvement
        return given >= self.total_quota * (1 - _SHORTFALL)

    def conflict(self) -> tuple[str, ...]:
        """The names of a smallest set of constraints without which the step would be feasible; empty if it is."""
        return ()

    def summary(self) -> dict[str, Tensor]:
        """The 0-d numbers that are logged, by name, in loss units per step (radius: L2 length of the whole step)."""
        return {
            "quota": self.total_quota,
            "radius": self.radius.square().sum().sqrt(),
            "forget_improvement": self.forget_improvement,
            "retain_improvement": self.retain_improvement,
            "feasible_improvement": self.feasible_improvement,
            "margin": self.margin,
        }


def exchange_objectives(gramian: Tensor) -> Tensor:
    """The Gramians after `(g_r, g_f) -> (-g_f, -g_r)`: HAMU-U is HAMU-Q on these.

    See docs/method.md#one-step, eq. 1.6.
    """
    return gramian.flip(1, 2)
