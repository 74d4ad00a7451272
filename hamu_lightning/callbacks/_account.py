"""What is said of a fit at its end: that unlearning happened, how far it came, and what it cost."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from hamu_lightning.callbacks import _compat, _compat_bar
from hamu_lightning.callbacks._ending import describe_ending
from hamu_lightning.callbacks._parts import Parts
from hamu_lightning.callbacks.goals import CEILINGS, Movement, StopReason
from hamu_lightning.errors import HAMUStateError
from hamu_lightning.wording import count

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


# A terminal's.
_WIDTH = 80


class Account:
    """Gives account of a fit.

    Args:
        parts: The parts of the fit.

    Attributes:
        averages: Who puts an average of the weights in the place of the model at the end.
        movement: Knows the weights that the fit has begun with.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.averages: list[str] = []
        self.movement: Movement | None = None
        self._still = ""
        self._warnings: list[str] = []

    def check_it_happened(self) -> None:
        """Raise unless there was unlearning: forgetting must never silently not happen."""
        parts = self._parts
        done = self._done()
        if parts.turns is not None and parts.is_resumed and parts.before["combined_steps"]:
            return  # this fit went on with what was left: the repair
        is_rest = parts.before["combined_steps"] and parts.settings.passes.every_n_steps > 1
        if is_rest and not done["forget_passes"] and not done["left_out_steps"]:
            return  # of a run that was resumed before its last plain steps
        is_excused = parts.stopper.reason is not None or (_compat.is_trial(parts.trainer) and done["left_out_steps"])
        missing = "forget passes" if not done["forget_passes"] else "combined steps"
        if done["forget_passes"] and (done["combined_steps"] or is_excused):
            return
        raise HAMUStateError(
            f"Expected unlearning to happen in this fit, but it ended with 0 {missing} "
            f"({count(done['left_out_steps'], 'was', 'were')} left out: numbers that are not finite, learning rate 0, "
            "no retain loss, an overflow of the loss scale). Check that the module's `training_step` runs through the "
            "Trainer, `every_n_steps` against the number of steps, the learning rates and the precision."
        )

    def check_it_began(self) -> str | None:
        """Raise if the fit has ended without a training batch, unless the checkpoint says that there was nothing left.

        Returns:
            That, in words: as of a job that was started again when it was done.
        """
        parts = self._parts
        if parts.is_started:
            return None
        reason = explain_no_batch(parts.trainer)
        is_complete = reason.startswith(("max_steps", "max_epochs"))
        if not (is_complete and parts.has_been_served()):
            raise HAMUStateError(
                f"Expected unlearning to happen in this fit, but it ended without a training batch: {reason}. "
                "Epochs and steps of a checkpoint count: give the Trainer more than those, or load the weights alone, "
                "Module.load_from_checkpoint(path), and fit without `ckpt_path`; for a Trainer that has fitted "
                "already, make a new one."
            )
        return (
            f"HAMU: no step in this fit, {reason}. The checkpoint is of the same request, for the same data, with "
            f"{count(parts.state_dict()['combined_steps'], 'combined step')}: nothing is left to do."
        )

    def _done(self) -> dict[str, int]:
        """What was done by this fit."""
        return {name: count - self._parts.before[name] for name, count in self._parts.counts().items()}

    def conclude(self) -> None:
        """Measure at the weights that the fit leaves; note if there is a target and the fit has ended before it."""
        groups = self._parts.groups
        groups.conclude_evidence()
        self._look_for_movement()
        if self._parts.stopper.reason is not None:
            return
        groups.conclude()
        short = groups.describe_short()
        if short:
            self._warnings.append(f"The fit has ended before the target: {short}")

    def tell(self, summary: str) -> None:
        """Say what there is to say, once the progress bar is closed."""
        stopped, warnings = self._parts.stopper.told, [*self._warnings]

        def say() -> None:
            for text in (stopped, summary):
                if text:
                    rank_zero_info(wrap(text))
            for warning in warnings:
                rank_zero_warn(warning)

        _compat_bar.when_bar_is_closed(self._parts.trainer, say)

    def _look_for_movement(self) -> None:
        parts, steps = self._parts, self._done()["combined_steps"]
        self._still = self.movement.describe() if self.movement is not None and steps else ""
        # Who went back on purpose says so; where longer steps were promised, that was said.
        is_back = parts.stopper.reason in CEILINGS or (parts.guarding is not None and parts.guarding.has_gone_back)
        if self._still and not is_back and not parts.journal.has_warned:
            self._warnings.append(
                f"{self._still}. {count(steps, 'combined step was', 'combined steps were')} too short for it. Give a "
                "larger quota, or a radius that no gradient makes small, such as RelativeRadius(1e-3)."
            )

    def log_evidence(self) -> None:
        """Log once what single samples show: hooks at the end of training take no `self.log`."""
        trainer = self._parts.trainer
        numbers = {f"hamu/{name}": number for name, number in self._parts.groups.evidence_numbers().items()}
        trainer.callback_metrics.update(numbers)
        for logger in trainer.loggers if numbers else ():
            logger.log_metrics({name: float(number) for name, number in numbers.items()}, step=trainer.global_step)

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
        """What was done by this fit, and by the run that it continues: a line for each subject.

        What was reached comes first; a table where there are several groups comes last.
        """
        parts = self._parts
        protected, requests = parts.groups.names_by_role()
        means = parts.groups.means()
        lines = [
            self._describe_result(),
            self._describe_ending(),
            *parts.groups.describe_levels(),
            *parts.journal.summary(means),
            "" if parts.verifier is None or parts.is_resumed else f"{parts.verifier.describe()}.",
            "" if parts.turns is None else f"{parts.turns.describe()}.",
            parts.journal.describe_promises(requests),
            parts.groups.describe_unseen(),
            *parts.groups.describe_evidence(),
            "" if parts.guarding is None else parts.guarding.describe(),
            f"{self._still}." if self._still else "",
            *(self._describe_run() if parts.is_resumed else ()),
            *(f"{n} then puts another model in place, an average: no number here is of it." for n in self.averages),
        ]
        table = parts.prices.format(lambda n: means[n] if n in means else parts.journal.path(n), protected, requests)
        return "\n  ".join(line for line in lines if line) + table

    def _describe_result(self) -> str:
        """How many steps there were, and what is reached."""
        done, reason = self._done(), self._parts.stopper.reason
        result = ""
        if reason is not None:
            is_begun = done["combined_steps"] or reason is not StopReason.TARGET_REACHED
            result = f", {reason.value}" + ("" if is_begun else " before the first step")
        elif self._parts.optimizer.rule.target_quotas:
            result = ", short of the target" if self._parts.groups.describe_short() else ", at the target"
        return f"HAMU: {count(done['combined_steps'], 'combined step')} ({done['left_out_steps']} left out){result}."

    def _describe_ending(self) -> str:
        """Who ended the fit: somebody else, or (on the way to a target) a limit of the Trainer."""
        parts, trainer = self._parts, self._parts.trainer
        if parts.stopper.reason is not None or not (trainer.should_stop or parts.optimizer.rule.target_quotas):
            return ""
        return describe_ending(trainer)

    def _describe_run(self) -> list[str]:
        """What was done by the whole run, of which this fit is a part."""
        parts, counts = self._parts, self._parts.counts()
        way = parts.journal.describe_run()
        return [
            f"With the run that this fit continues: {count(counts['combined_steps'], 'combined step')} "
            f"({counts['left_out_steps']} left out)" + (f", {way}." if way else "."),
            "" if parts.verifier is None else f"{parts.verifier.describe()}.",
        ]


def wrap(text: str) -> str:
    """Break lines that are too long for a terminal; what follows is indented."""
    return "\n".join(_break(line) for line in text.splitlines())


def _break(line: str) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def explain_no_batch(trainer: Trainer) -> str:
    """Why a fit ended without a training batch, in words."""
    steps, epochs = trainer.global_step, trainer.current_epoch
    if trainer.limit_train_batches == 0:
        return "limit_train_batches is 0"
    if trainer.fit_loop.max_batches == 0:
        return "the training loader has none"
    if trainer.max_steps != -1 and steps >= trainer.max_steps:
        return f"max_steps={trainer.max_steps} is reached, with {count(steps, 'step')} before this fit"
    if trainer.max_epochs not in (None, -1) and epochs >= trainer.max_epochs:
        return f"max_epochs={trainer.max_epochs} is reached, with {count(epochs, 'epoch')} before this fit"
    return "something stopped the Trainer before the first one"
