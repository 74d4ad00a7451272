"""What callers decide about the steps of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hamu_lightning.optim._engine import Engine, Plan
from hamu_lightning.optim._report import StepReport
from hamu_lightning.optim._trial import Referee


class SteeredSteps:
    """What the next step is to do, and who is asked about each one."""

    _core: Engine

    def plan_step(
        self,
        plan: Plan = "combine",
        *,
        window_shares: tuple[float, float] = (1.0, 1.0),
        groups: tuple[str, ...] = (),
    ) -> None:
        """Say what the next `step()` is to do; afterwards it is "combine" again.

        Args:
            plan: "combine" the gradients, take a plain step of the base on the retain gradient ("retain_only"), or
                do nothing ("drop").
            window_shares: The shares of the mean retain and of the mean forget gradients that the slots hold: n/N when
                losses were divided by N but only n micro-batches came (the last window of an epoch).
            groups: The groups that take part, retain first; default: all of the rule's.
        """
        self._core.plan, self._core.window_shares, self._core.groups = plan, window_shares, groups

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
    def region(self) -> float:
        """What the radius of the rule is multiplied by; with a base other than plain SGD, its step."""
        return self._core.region

    @property
    def region_limit(self) -> float:
        """How large `region` may be at most, whatever the referee says."""
        return self._core.region_limit

    @region_limit.setter
    def region_limit(self, limit: float) -> None:
        self._core.region_limit = limit
        if self._core.referee is not None:
            self._core.referee.region = self._core.region

    def undo_steps(self, number: int, then: dict[str, Any]) -> None:
        """Count so many steps as undone that were applied since `hamu_state_dict` returned `then`.

        On the way to targets too. Who calls puts the weights and the base's state of that time back.
        """
        self._core.undo_steps(number, then)

    @property
    def recompute(self) -> Callable[[str], object] | None:
        """With `sketch`: runs the backward pass of a group again, on the same batches with the same random numbers."""
        return self._core.recompute

    @recompute.setter
    def recompute(self, recompute: Callable[[str], object] | None) -> None:
        self._core.recompute = recompute
