"""What single samples show: whether a target that the mean has reached can be believed, and the table at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from hamu_lightning.callbacks.goals._reading import InOrder, Reader, read_in_order
from hamu_lightning.callbacks.goals._sample_losses import OBJECTIVE, SampleLosses, SampleReader
from hamu_lightning.callbacks.goals._samples_table import ForgottenSamples
from hamu_lightning.callbacks.goals._statistics import (
    estimate_auc,
    estimate_ratio,
    looks_remembered,
    tell,
)
from hamu_lightning.callbacks.goals._surroundings import AnswerTarget
from hamu_lightning.callbacks.goals._targets import Target
from hamu_lightning.callbacks.passes import ForgetPass
from hamu_lightning.metrics.functional import Estimate, mean_estimate

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# A held-out loss that has become so many times what it was runs away.
_RUNS_AWAY = 2.0
# Where the mean alone has reached its target, ranks are looked at again after so many combined steps.
_LOOK_EVERY = 10
# Of samples that a retrained model never saw, up to 44 % were surer than before: from here on it is said.
_MANY = 0.5
FORGET, HELD_OUT = "forget", "held-out"
_ONE_BY_ONE = "not forgotten one by one"
_FEW = (
    "A few samples can raise a mean while others become surer; a target with an end for each sample, Unseen(holdout), "
    "does not let them"
)


class Evidence:
    """Reads the losses of single samples at the start, where the mean has reached its target, and at the end.

    Args:
        trainer: The trainer.
        forget_pass: What runs batches without a trace.
        forget: The loader of what is to be forgotten.
        held_out: Gives the loader of held-out data; None where the target has none.
        target: What is to be reached.
        state: What `state_dict` returned in the run that this one continues.

    Attributes:
        table: What became of each sample; None before the end, and where it cannot be told.
        doubt: Why the losses do not compare, in words; empty where nothing speaks against it.
    """

    def __init__(
        self,
        trainer: Trainer,
        forget_pass: ForgetPass,
        forget: Any,
        held_out: Callable[[], Any] | None,
        target: Target | float,
        state: Mapping[str, Any],
    ) -> None:
        self._trainer = trainer
        by_objective = isinstance(target, Target) and target.by_objective
        self._reader = SampleReader(trainer, forget_pass, state.get("form"), by_objective=by_objective)
        self._target = target
        self._sources: dict[str, Callable[[], Any]] = {FORGET: lambda: forget}
        if held_out is not None:
            self._sources[HELD_OUT] = held_out
        self._data: dict[str, InOrder | None] = {}
        self._is_begun = bool(state)
        self._before = {name: SampleLosses(*losses) for name, losses in state.get("before", {}).items()}
        self._auc_before = self._estimate_auc(self._before)
        self._now: dict[str, SampleLosses] = {}
        self._auc: Estimate | None = None
        self._read_at = -1
        self._first: Tensor | None = state.get("held_out_level")
        self._runaway = ""
        self.doubt = ""
        self.table: ForgottenSamples | None = None

    def take_held_out(self, loader: Any) -> None:
        """Compare with these samples, where there are none to compare with; before anything is read."""
        if not self._is_begun:
            self._sources.setdefault(HELD_OUT, lambda: loader)

    def find_held_out(self) -> Any:
        """The loader of held-out data; None where there is none."""
        return self._sources[HELD_OUT]() if HELD_OUT in self._sources else None

    def begin(self, *step: Any) -> None:
        """Read all samples before the first step.

        Args:
            step: What runs a batch, and the arguments of the retain batch.
        """
        if not self._is_begun:
            self._is_begun = True
            self._before = self._read(*step)
            self._auc_before = self._estimate_auc(self._before)

    def look(self, taken: int, *step: Any) -> None:
        """Read them at the present weights, after so many steps."""
        self._read_at, self._now = taken, self._read(*step)
        self._auc = self._estimate_auc(self._now)

    def confirms(self, taken: int, *step: Any) -> bool:
        """Whether ranks do not speak against a mean that has reached its target: looks again every 10 steps."""
        if HELD_OUT not in self._before:
            return True
        if not self._is_fresh(taken):
            self.look(taken, *step)
        # Processes may have computed in different orders; they have to decide alike.
        return bool(self._trainer.strategy.broadcast(not self.contradicts))

    def waits(self, taken: int) -> bool:
        """Whether they spoke against the mean, and will not be read again yet."""
        return self.contradicts and self._is_fresh(taken)

    def _is_fresh(self, taken: int) -> bool:
        return self._read_at >= 0 and 0 <= taken - self._read_at < _LOOK_EVERY

    def clear(self) -> None:
        """Forget what was read last: the weights have gone back since."""
        self._now, self._auc, self._read_at = {}, None, -1

    @property
    def contradicts(self) -> bool:
        """Whether forgotten samples still have lower losses than held-out ones, as they were read last."""
        return self._auc is not None and looks_remembered(self._auc)

    def conclude(self, taken: int, *step: Any, is_still: bool) -> None:
        """Read all samples at the end of the fit, and make the table.

        Args:
            taken: After so many steps.
            step: What runs a batch, and the arguments of the retain batch.
            is_still: Whether no weight has moved since these steps: what was read then is not read again.
        """
        if not (is_still and self._now and self._read_at == taken):
            self.look(taken, *step)
        before, now, data = self._before.get(FORGET), self._now.get(FORGET), self._data.get(FORGET)
        if before is None or now is None or data is None or data.positions is None:
            return
        if len(before.losses) == len(now.losses):
            held_out = self._now[HELD_OUT].of_classes(now) if HELD_OUT in self._now else None
            positions = torch.tensor(data.positions or range(len(now.losses)))
            self.table = ForgottenSamples.of(positions, before.losses, now.losses, now.recognised, held_out)

    def watch(self, level: Tensor, *step: Any) -> None:
        """Notice a level of held-out data that runs away."""
        if self._first is None:
            self._first = level
        is_above = bool(level >= _RUNS_AWAY * self._first) and bool(self._first > 0)
        if HELD_OUT not in self._sources or self._runaway or not is_above:
            return
        times = f"{float(level / self._first):.3g}"
        now = self._read(*step).get(HELD_OUT)
        if now is not None and HELD_OUT in self._before:
            ratio = self._trainer.strategy.broadcast(estimate_ratio(now.losses, self._before[HELD_OUT].losses))
            assert ratio.interval is not None
            if ratio.interval[0] < _RUNS_AWAY:
                return
            times = tell(ratio)
        self._runaway = (
            f"The loss of the held-out data runs away: from {float(self._first):.4g} to {float(level):.4g}, times "
            f"{times}, since the start. They hold samples of what is forgotten, or such as look like it, or the steps "
            "harm the model as a whole; a target that they give moves on with each step. Hold out samples of what "
            "stays, give Chance() or a loss, or take a smaller radius."
        )
        rank_zero_warn(self._runaway)

    def means(self) -> tuple[float, float] | None:
        """The loss of what is to be forgotten, before and now, where both are means of the module's own loss."""
        if self._reader.form == OBJECTIVE or not (FORGET in self._before and FORGET in self._now):
            return None
        return float(self._before[FORGET].losses.mean()), float(self._now[FORGET].losses.mean())

    def numbers(self) -> dict[str, Tensor]:
        """What is logged at the end."""
        found: dict[str, float] = {}
        if self.table is not None:
            found |= {"surer": self.table.surer, "recognised": self.table.recognised}
        if self._auc is not None and self._auc.interval is not None:
            lower, upper = self._auc.interval
            found |= {"auc": self._auc.value, "auc_lower": lower, "auc_upper": upper}
        return {name: torch.tensor(value) for name, value in found.items() if value == value}

    def intervals(self) -> str:
        """What was read last, in words with 95 % intervals; empty where nothing was."""
        told = [f"{name} loss {tell(_mean_of(read.losses))}" for name, read in self._now.items()]
        told += [] if self._auc is None else [f"AUC {tell(self._auc)}"]
        return f"; 95 % intervals over samples: {', '.join(told)}" if told else ""

    def describe(self, *, is_reached: bool) -> list[str]:
        """What single samples show at the end, in lines; `is_reached`: whether the mean is at its target."""
        told = [] if self.table is None else [_describe_table(self.table, is_part=self._is_excerpt)]
        if self._auc is not None:
            before = "" if self._auc_before is None else f", before {tell(self._auc_before)}"
            held_out = len(self._now[HELD_OUT].of_classes(self._now[FORGET]))
            which = "" if held_out == len(self._now[HELD_OUT].losses) else " of the same classes"
            told.append(f"AUC against {held_out} held-out samples{which} {tell(self._auc)}{before}")
        verdict = self.judge() if is_reached else ""
        unknown = "" if told or not self._is_begun else self._explain_unknown()
        return [f"{part.rstrip('.')}." for part in (*told, verdict, unknown, self.doubt, self._runaway) if part]

    def judge(self) -> str:
        """Where the mean is at its target, and the samples are not, in words; empty where nothing speaks against it."""
        if self.contradicts:
            fault = "forgotten samples still have lower losses than held-out ones"
        elif self.table is not None and self.table.surer > _MANY:
            fault = f"{100 * self.table.surer:.0f} % of the forgotten samples are surer than before"
        else:
            return ""
        what = self._target.what if isinstance(self._target, AnswerTarget) else "loss"
        return f"The mean {what} has reached its target, but {fault}: {self.advice}"

    @property
    def advice(self) -> str:
        """Of samples that are remembered although the mean is at its target: what is wrong, with the cure."""
        return f"{_ONE_BY_ONE}. {'Give it more steps' if isinstance(self._target, AnswerTarget) else _FEW}"

    def _explain_unknown(self) -> str:
        data = self._data.get(FORGET)
        if data is not None and data.positions is None and FORGET in self._now:
            return "There is no table of samples: the loader gives them in no order that is known"
        return "The losses of single samples cannot be told, so that nothing is known of their ranks"

    @property
    def _is_excerpt(self) -> bool:
        data = self._data.get(FORGET)
        return data is not None and data.is_excerpt

    def state_dict(self) -> dict[str, Any]:
        """Return what was read before the first step, in tensors and numbers; empty before."""
        if not self._is_begun:
            return {}
        before = {name: list(read) for name, read in self._before.items()}
        return {"form": self._reader.form, "before": before, "held_out_level": self._first}

    def close(self) -> None:
        """Let the workers go that read."""
        for data in self._data.values():
            if data is not None:
                data.batches.close()

    def _read(self, *step: Any) -> dict[str, SampleLosses]:
        self._data = self._data or {name: read_in_order(find()) for name, find in self._sources.items()}
        found = {n: self._reader.read(data, *step) for n, data in self._data.items() if data is not None}
        return {name: losses for name, losses in found.items() if losses is not None}

    @staticmethod
    def _estimate_auc(read: Mapping[str, SampleLosses]) -> Estimate | None:
        if not (FORGET in read and HELD_OUT in read):
            return None
        held_out = read[HELD_OUT].of_classes(read[FORGET])
        return estimate_auc(read[FORGET].losses, held_out) if len(held_out) else None


def gather_evidence(
    trainer: Trainer,
    forget_pass: ForgetPass,
    forget: Any,
    target: Target | float,
    reader: Reader,
    state: Mapping[str, Any],
) -> Evidence:
    """Make the evidence for a target, and take its held-out data in, with a warning where they do not compare.

    Args:
        trainer: The trainer.
        forget_pass: What runs batches without a trace.
        forget: The loader of what is to be forgotten.
        target: The target.
        reader: Finds held-out data.
        state: What `state_dict` returned in the run that this one continues.
    """
    held_out: Callable[[], Any] | None = None
    doubt = ""
    if isinstance(target, Target) and target.has_held_out:
        doubt = reader.take_held_out(target.data, forget, target.transform_like)
        held_out = partial(reader.find, target.data)
    elif HELD_OUT in state.get("before", ()):  # the target found them at the start of the run
        held_out = partial(reader.find_undivided, None)
    evidence = Evidence(trainer, forget_pass, forget, held_out, target, state)
    evidence.doubt = doubt
    return evidence


def _mean_of(losses: Tensor) -> Estimate:
    """Their mean, which lies between the least and the most, however few carry it."""
    return mean_estimate(losses, "losses", limits=(float(losses.min()), float(losses.max())))


def _describe_table(table: ForgottenSamples, *, is_part: bool) -> str:
    known = table.recognised == table.recognised
    recognised = f", {100 * table.recognised:.0f} % still recognised" if known else ""
    what = f"{len(table)} forgotten samples, a part of them," if is_part else f"{len(table)} forgotten samples"
    return f"Of {what} {100 * table.surer:.0f} % are surer than before{recognised}"
