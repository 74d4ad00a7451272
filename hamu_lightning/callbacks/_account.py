"""What is said of a fit at its end: that unlearning happened, how far it came, and what it cost."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from hamu_lightning.callbacks import _compat
from hamu_lightning.callbacks._parts import Parts
from hamu_lightning.errors import HAMUStateError


class Account:
    """Gives account of a fit.

    Args:
        parts: The parts of the fit.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def check_it_happened(self) -> None:
        """Raise unless there was unlearning: forgetting must never silently not happen."""
        parts = self._parts
        done = {name: count - parts.before[name] for name, count in parts.counts().items()}
        if parts.turns is not None and parts.before["combined_steps"]:
            return  # this fit went on with what was left: the repair
        is_rest = parts.before["combined_steps"] and parts.settings.passes.every_n_steps > 1
        if is_rest and not done["forget_passes"] and not done["left_out_steps"]:
            return  # of a run that was resumed before its last plain steps
        is_excused = parts.stopper.reason is not None or (_compat.is_trial(parts.trainer) and done["left_out_steps"])
        missing = "forget passes" if not done["forget_passes"] else "combined steps"
        if done["forget_passes"] and (done["combined_steps"] or is_excused):
            return
        raise HAMUStateError(
            f"Expected unlearning to happen in this fit, but it ended with 0 {missing} ({done['left_out_steps']} were "
            "left out: numbers that are not finite, learning rate 0, no retain loss, an overflow of the loss scale). "
            "Check that the module's `training_step` runs through the Trainer, `every_n_steps` against the number of "
            "steps, the learning rates and the precision."
        )

    def warn_if_short(self) -> None:
        """Say so if there is a target and the fit has ended before it."""
        if self._parts.stopper.reason is not None:
            return
        self._parts.groups.conclude()
        short = self._parts.groups.describe_short()
        if short:
            rank_zero_warn(
                f"The fit has ended before the target: {short}. "
                "Give it more steps, or a larger radius: HAMUQ(TargetQuota(...), radius=RelativeRadius(3e-3))."
            )

    def draw_costs(self) -> None:
        """Show in TensorBoard which request makes which protection expensive."""
        parts = self._parts
        if parts.trainer.is_global_zero:
            parts.prices.draw(parts.trainer, *parts.groups.names_by_role())

    def mean_costs(self) -> Tensor:
        """For each protected group and each request, the mean of `GroupCoefficients.costs`."""
        return self._parts.prices.costs(*self._parts.groups.names_by_role())

    def totals(self) -> dict[str, Tensor]:
        """What was done, in numbers for `trainer.callback_metrics`."""
        numbers = {**self._parts.counts(), "has_stopped": self._parts.stopper.reason is not None}
        return {f"hamu/{name}": torch.tensor(float(number)) for name, number in numbers.items()}

    def summary(self) -> str:
        """One line on what was done, and a table where there are several groups."""
        parts, counts = self._parts, self._parts.counts()
        return (
            f"HAMU: {counts['combined_steps']} combined steps ({counts['left_out_steps']} left out), "
            f"{parts.journal.summary()}."
            + ("" if parts.verifier is None else f" {parts.verifier.describe()}.")
            + ("" if parts.turns is None else f" {parts.turns.describe()}.")
            + parts.prices.format(parts.journal.path, *parts.groups.names_by_role())
        )
