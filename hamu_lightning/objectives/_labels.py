"""Objectives that need labels alone: the sample's own, random ones, or all of them alike."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor
from typing_extensions import override

from hamu_lightning.checks import check_seed
from hamu_lightning.objectives._base import BatchPass, Objective, to_raise
from hamu_lightning.objectives._keys import Key, as_key, draw_places
from hamu_lightning.objectives._outputs import Outputs, as_outputs
from hamu_lightning.objectives._packed import check_padded


class CrossEntropy(Objective):
    """-log p of the label in nats, per sample: lowered on retain, raised on forget.

    The mean over a sample's tokens, then over samples; many modules' own loss is the mean over all tokens of the batch.
    Unlike `ModuleLoss` it is known for each sample, which `LossCap` needs, and shares its forward pass.

    Args:
        outputs: How to ask the module.
    """

    is_forget_only = False
    is_nonnegative = True

    def __init__(self, *, outputs: Outputs | None = None) -> None:
        self.outputs = as_outputs(outputs)

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        prediction = batch.predict(self.outputs)
        return prediction.mean_over_places(-prediction.log_likelihoods())


class RandomLabels(Objective):
    """Predict a wrong label, drawn once for each sample (Graves et al. 2021, arXiv 2010.10981).

        to raise   log p(y'|x) <= 0,   y' uniform over the classes other than y

    the mean over a sample's tokens (each with a label of its own), then over samples. A finite target: forgetting ends
    when the wrong labels are learnt. A sample keeps its label in each epoch and after a resume, since it follows from
    the seed and the sample alone; nothing is drawn from a random generator.

    Args:
        seed: Of the labels.
        key: A function of the batch that returns a number for each sample, int64 `[N]`, such as the index in the data
            set. Default: the bits of the sample's tensors; with random augmentation a sample then changes its label.
        outputs: How to ask the module.
    """

    def __init__(self, seed: int = 0, *, key: Key | None = None, outputs: Outputs | None = None) -> None:
        self.seed, self.key, self.outputs = check_seed(seed), as_key(key), as_outputs(outputs)

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        prediction = batch.predict(self.outputs)
        check_padded(batch.batch, prediction.labels.shape, "RandomLabels, which draws for each sample")
        classes, places = prediction.logits.shape[-1], prediction.labels.shape[1]
        keys = self.key(batch.batch).to(prediction.labels.device)
        # Added to the label modulo the classes, 1 ... C - 1 gives all labels but the own one.
        offsets = 1 + draw_places(classes - 1, keys, places, self.seed)
        wrong = replace(prediction, labels=(prediction.labels + offsets) % classes)
        return to_raise(wrong.mean_over_places(-wrong.log_likelihoods()))


class UniformLabels(Objective):
    """Predict all C classes alike.

        to raise   -KL(uniform || p(.|x)) = log C + mean over classes of log p(c|x) <= 0

    the mean over a sample's tokens, then over samples. A finite target: at 0 the module guesses.

    Args:
        outputs: How to ask the module.
    """

    def __init__(self, *, outputs: Outputs | None = None) -> None:
        self.outputs = as_outputs(outputs)

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        prediction = batch.predict(self.outputs)
        return to_raise(prediction.mean_over_places(prediction.by_rows(_divergence_of_guess)))


def _divergence_of_guess(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1])
