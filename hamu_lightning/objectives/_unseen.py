"""What a retrained model would say about a forgotten sample: what it says about samples that it never saw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from typing_extensions import override

from hamu_lightning.checks import check_type
from hamu_lightning.objectives._base import BatchPass, Objective, Stateful
from hamu_lightning.objectives._calibration import Calibration
from hamu_lightning.objectives._odds import ClassOutputs, is_label_of, log_odds
from hamu_lightning.objectives._outputs import Outputs, as_outputs
from hamu_lightning.objectives._reference import Reference, as_reference
from hamu_lightning.objectives._rows import RowFunction

# A class that is gone is not made less likely than this many times the log-odds of a guess.
_LEAST_LIKELY = 3.0


class AnswerObjective(Objective):
    """Raises what a module says towards an answer that is fixed beforehand, from 0 to `end`.

    The answer is one of a model in evaluation mode, and so is what is raised: the gradient under dropout is that of
    another model at each step, and of what such steps promise little comes true.

    Args:
        reference: p0, the model before unlearning, in evaluation mode.
        teacher: A model that never saw what is to be forgotten, and says `s` in the place of p0.
        outputs: How to ask the models.
    """

    is_nonnegative = True
    evaluates = True
    _parts: ClassVar[tuple[str, ...]] = ("reference", "teacher")

    def __init__(
        self,
        *,
        reference: Reference | None = None,
        teacher: Reference | None = None,
        outputs: Outputs | None = None,
    ) -> None:
        check_type("teacher", teacher, Reference | None, "FrozenCopy(model), or another reference")
        self.reference, self.teacher = as_reference(reference), teacher
        self.outputs = ClassOutputs(as_outputs(outputs))

    @property
    def end(self) -> Objective:
        """The most that each sample can come to, as an objective: where its answer is given exactly."""
        return _End(self)

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        return self._over_places(batch, self.gains)

    def end_samples(self, batch: BatchPass) -> Tensor:
        """The end of each sample, `[N]` in nats."""

        def ends(logits: Tensor, labels: Tensor, original: Tensor, besides: Tensor) -> Tensor:
            return self.gains(None, labels, original, besides)

        with torch.no_grad():
            return self._over_places(batch, ends)

    def gains(self, logits: Tensor | None, labels: Tensor, original: Tensor, besides: Tensor) -> Tensor:
        """What has come true of the answer, `[...]` in nats.

        Args:
            logits: Of the module, `[..., C]`; None for the end.
            labels: `[...]`.
            original: The logits before unlearning, `[..., C]`.
            besides: Those of who says s, `[..., C]`.
        """
        raise NotImplementedError

    def _over_places(self, batch: BatchPass, gains: RowFunction) -> Tensor:
        prediction, original = self.reference.predict(batch, self.outputs)
        teacher = self.teacher
        besides = original if teacher is None else teacher.logits_for(prediction, batch, self.outputs)
        return prediction.mean_over_places(prediction.by_rows(gains, original, besides))

    @override
    def _stateful(self) -> dict[str, Stateful]:
        return {name: part for name in self._parts if (part := getattr(self, name)) is not None}


class UnseenAnswer(AnswerObjective):
    """Answer a forgotten sample as a model would that never saw it (ours; docs/method.md#an-unseen-sample).

    With `p0` the model before unlearning, `phi = log(p_y/(1-p_y))` the log-odds of the label `y`, and `s` what `p0`
    says besides: without the label and the classes that go as a whole, renormalised. Where others of the class stay

        to raise   KL(q || p0) - KL(q || p),   q = sigmoid(phi_t) on y, (1 - sigmoid(phi_t)) s elsewhere       eq. 13.3
        end        KL(q || p0)

    with `phi_t` of `Calibration`. Where the class goes as a whole (G: all classes that go, phi their log-odds together)

        to raise   min(-phi, -phi_t) + phi0 + KL(s || p0 without G) - KL(s || p without G)                     eq. 13.5
        end        phi0 - phi_t + KL(s || p0 without G)
        phi_t = min(phi0, max(-3 log C, log-odds of the least likely class under s))

    in nats per place; the mean over a sample's places, the mean over samples. Both begin at 0. A sample has its full
    gradient while it is remembered, and none once it is not; cross-entropy does the opposite. Where one class is left
    besides G, phi_t is -3 log C.

    Args:
        calibration: What is known of held-out samples; default: an empty one. `HAMUCallback(target=Unseen(...))` fits
            it at the start.
        reference: p0, in evaluation mode.
        teacher: A model that never saw what is to be forgotten, and says `s` in the place of p0.
        outputs: How to ask the models.

    Raises:
        HAMUStateError: If (at the first batch) the calibration is empty.
    """

    _parts = ("reference", "teacher", "calibration")

    def __init__(
        self,
        calibration: Calibration | None = None,
        *,
        reference: Reference | None = None,
        teacher: Reference | None = None,
        outputs: Outputs | None = None,
    ) -> None:
        super().__init__(reference=reference, teacher=teacher, outputs=outputs)
        check_type("calibration", calibration, Calibration | None, "a Calibration, or None")
        self.calibration = Calibration() if calibration is None else calibration

    @override
    def gains(self, logits: Tensor | None, labels: Tensor, original: Tensor, besides: Tensor) -> Tensor:
        calibration = self.calibration
        calibration.check_is_there()
        goes = calibration.goes(labels.device)
        is_label = is_label_of(labels, original.shape[-1])
        found = []
        if calibration.has_samples or not calibration.has_whole_classes:
            aim = calibration.find(log_odds(original, is_label), labels)
            found.append(SampleAnswer(original, is_label, aim, second_choice(besides, is_label, goes)).gain(logits))
        if calibration.has_whole_classes:
            found.append(ClassAnswer(original, goes, besides).gain(logits))
        if len(found) == 1:
            return found[0]
        return torch.where(calibration.are_whole(labels), found[1], found[0])


class SecondAnswer(AnswerObjective):
    """Answer with the second choice, for samples whose label is wrong (ours; docs/method.md#an-unseen-sample).

        to raise   KL(s || p0) - KL(s || p),   s = p0 without the label, renormalised                          eq. 13.7
        end        KL(s || p0) = -log(1 - p0_y)

    in nats per place; the mean over a sample's places, the mean over samples. It begins at 0. Distilling the second
    choice on the forget data alone is DELETE (Zhou et al. 2025, CVPR).

    Args:
        reference: p0, in evaluation mode.
        teacher: As for `UnseenAnswer`.
        outputs: How to ask the models.
    """

    @override
    def gains(self, logits: Tensor | None, labels: Tensor, original: Tensor, besides: Tensor) -> Tensor:
        is_label = is_label_of(labels, original.shape[-1])
        return expected_gain(second_choice(besides, is_label, None), original, logits)


@dataclass(frozen=True)
class SampleAnswer:
    """The answer to a sample of a class that stays.

    Args:
        original: Logits before unlearning, `[..., C]`.
        is_label: Where the label is, bool `[..., C]`.
        aim: phi_t, `[...]`.
        besides: log s, `[..., C]`.
    """

    original: Tensor
    is_label: Tensor
    aim: Tensor
    besides: Tensor

    def gain(self, logits: Tensor | None) -> Tensor:
        """What has come true of it, `[...]`; with None the end."""
        aim = self.aim.unsqueeze(-1)
        answer = torch.where(self.is_label, logsigmoid(aim), logsigmoid(-aim) + self.besides)
        return expected_gain(answer, self.original, logits)


@dataclass(frozen=True)
class ClassAnswer:
    """The answer to a sample of a class that goes as a whole.

    Args:
        original: Logits before unlearning, `[..., C]`.
        goes: Which classes go, bool `[C]`.
        besides: Logits of who says s, `[..., C]`.
    """

    original: Tensor
    goes: Tensor
    besides: Tensor

    def gain(self, logits: Tensor | None) -> Tensor:
        """What has come true of it, `[...]`; with None the end."""
        start, aim = log_odds(self.original, self.goes), self.aim()
        besides = self.without(self.besides).log_softmax(-1)
        kept = None if logits is None else self.without(logits)
        others = expected_gain(besides, self.without(self.original), kept)
        if logits is None:
            return start - aim + others
        return torch.minimum(-log_odds(logits, self.goes), -aim) + start + others

    def without(self, logits: Tensor) -> Tensor:
        """The logits without the classes that go."""
        return logits.masked_fill(self.goes, -math.inf)

    def aim(self) -> Tensor:
        """phi_t, `[...]`."""
        floor = -_LEAST_LIKELY * math.log(self.original.shape[-1])
        besides = self.without(self.besides).log_softmax(-1)
        least = besides.masked_fill(self.goes, math.inf).amin(-1)
        odds = least - torch.log(-torch.expm1(least))
        # Of one class that is left the odds are endless, and it is no guess to be as likely as that one.
        odds = torch.where((~self.goes).sum() > 1, odds, floor)
        return torch.minimum(odds.clamp(min=floor), log_odds(self.original, self.goes))


class _End(Objective):
    """Where each sample should end."""

    def __init__(self, objective: AnswerObjective) -> None:
        self._objective = objective

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        return self._objective.end_samples(batch)


def second_choice(logits: Tensor, is_label: Tensor, goes: Tensor | None) -> Tensor:
    """Log s: what is said without the label and the classes that go, renormalised; -inf on these.

    Where nothing is left, as with two classes of which one goes, that one is left in.
    """
    hidden = is_label if goes is None else is_label | goes
    hidden = torch.where(hidden.all(-1, keepdim=True), is_label, hidden)
    return logits.masked_fill(hidden, -math.inf).log_softmax(-1)


def expected_gain(answer: Tensor, original: Tensor, logits: Tensor | None) -> Tensor:
    """KL(q || p0) - KL(q || p) over the last dimension, for log q; with None in the place of p: KL(q || p0)."""
    before = original.log_softmax(-1)
    after = answer if logits is None else logits.log_softmax(-1)
    likely = answer.exp()
    # What the answer leaves out is no number on either side: not even a gradient may come from there.
    difference = torch.where(likely > 0, after, 0.0) - torch.where(likely > 0, before, 0.0)
    return (likely * difference).sum(-1)
