"""Objectives from preference learning: what is to be forgotten is an answer that is not preferred."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from typing_extensions import override

from hamu_lightning.checks import check_count, check_number, check_positive, check_seed, check_type, describe
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives._base import BatchPass, Objective, to_raise
from hamu_lightning.objectives._keys import Key, as_key, draw_below
from hamu_lightning.objectives._outputs import IGNORED, Outputs, as_outputs
from hamu_lightning.objectives._reference import Reference, as_reference


class NPO(Objective):
    """Negative preference optimization (Zhang et al. 2024, arXiv 2404.05868, equation 3).

        to raise   (2 / beta) log sigmoid(-beta log(p(y|x) / p_ref(y|x))) <= 0

    log p(y|x) is the *sum* over a sample's tokens; then the mean over samples. As beta -> 0 it becomes gradient ascent
    on the summed cross-entropy (up to a constant): at the reference the gradient is that for every beta.

    Args:
        beta: Inverse temperature, per nat: the larger, the sooner forgetting a sample ends.
        reference: p_ref.
        outputs: How to ask the models.

    Raises:
        HAMUValueError: If `beta` is not positive.
    """

    _parts = ("reference",)

    def __init__(
        self, beta: float = 0.1, *, reference: Reference | None = None, outputs: Outputs | None = None
    ) -> None:
        self.beta = check_positive("beta", beta)
        self.reference, self.outputs = as_reference(reference), as_outputs(outputs)

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        ratio = self.reference.log_ratio(batch, self.outputs)
        return to_raise(-2 / self.beta * logsigmoid(-self.beta * ratio))


class SimNPO(Objective):
    """NPO without a reference, normalised by length (Fan et al. 2024, arXiv 2410.07163).

        to raise   (2 / beta) log sigmoid(-(beta / |y|) log p(y|x) - gamma) <= 0

    log p(y|x) is the sum over a sample's |y| tokens, so their *mean* counts; then the mean over samples.

    Args:
        beta: Inverse temperature, per nat.
        gamma: Margin by which a sample has to be forgotten, without a unit as `beta` times nats.
        outputs: How to ask the module.

    Raises:
        HAMUValueError: If `beta` is not positive.
    """

    def __init__(self, beta: float = 2.5, gamma: float = 0.0, *, outputs: Outputs | None = None) -> None:
        self.beta, self.gamma = check_positive("beta", beta), check_number("gamma", gamma)
        self.outputs = as_outputs(outputs)

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        prediction = batch.predict(self.outputs)
        mean = prediction.mean_over_places(prediction.log_likelihoods())
        return to_raise(-2 / self.beta * logsigmoid(-self.beta * mean - self.gamma))


class DPO(Objective):
    """Direct preference optimization: y_w is preferred to y_l, which is to be forgotten (Rafailov et al. 2023).

        to raise   (1 / beta) log sigmoid(beta log(p(y_w|x) / p_ref(y_w|x)) - beta log(p(y_l|x) / p_ref(y_l|x))) <= 0

    as in Zhang et al. 2024, arXiv 2404.05868 (some public code has 2 / beta). Log-likelihoods are *sums*
    over a sample's tokens; then the mean over samples.

    Args:
        preferred: Makes from the forget batch a batch of the same form and order with the preferred answers. Default:
            the entry `preferred` of a mapping, whose other entries are the answers to be forgotten.
        beta: Inverse temperature.
        reference: p_ref.
        outputs: How to ask the models.

    Raises:
        HAMUValueError: If `beta` is not positive, or (at the first batch) there is nothing preferred.
    """

    _parts = ("reference",)
    _factor = 1.0

    def __init__(
        self,
        preferred: Callable[[Any], Any] | None = None,
        beta: float = 0.1,
        *,
        reference: Reference | None = None,
        outputs: Outputs | None = None,
    ) -> None:
        if preferred is not None:
            check_type("preferred", preferred, Callable, "a function of the forget batch")
        self.preferred, self.beta = preferred, check_positive("beta", beta)
        self.reference, self.outputs = as_reference(reference), as_outputs(outputs)

    @override
    def samples(self, batch: BatchPass) -> Tensor:
        pair = self.find_pair(batch.batch)
        preferred, other = (self.reference.log_ratio(BatchPass(batch.module, b), self.outputs) for b in pair)
        return to_raise(-self._factor / self.beta * logsigmoid(self.beta * (preferred - other)))

    def find_pair(self, batch: Any) -> tuple[Any, Any]:
        """The batch of the preferred answers, and that of the answers to be forgotten."""
        if self.preferred is not None:
            return self.preferred(batch), batch
        if not isinstance(batch, Mapping) or "preferred" not in batch:
            raise HAMUValueError(
                "Expected the forget batch to be a mapping with 'preferred', but got a "
                f"{type(batch).__name__} without. Pass DPO(preferred=...), a function that makes the batch of the "
                "preferred answers from it."
            )
        return batch["preferred"], {name: value for name, value in batch.items() if name != "preferred"}


class AltPO(DPO):
    """DPO with other plausible answers preferred, and twice the factor (Mekala et al. 2025, COLING, arXiv 2409.13474).

        to raise   (2 / beta) log sigmoid(beta log(p(y_a|x) / p_ref(y_a|x)) - beta log(p(y|x) / p_ref(y|x))) <= 0

    The answers y_a are of the same kind as the right ones and false, written by a model that was asked to make facts
    up; several for one question are several samples. Unlike "I do not know" they leave no gap.

    Args:
        preferred: As for `DPO`: makes the batch of other answers, by default the entry `preferred`.
        beta: As for `DPO`.
        reference: As for `DPO`.
        outputs: How to ask the models.

    Raises:
        HAMUValueError: As `DPO`.
    """

    _factor = 2.0


class IdkDPO(DPO):
    """DPO whose preferred answers are "I do not know" (TOFU, Maini et al. 2024, arXiv 2401.06121).

    For token batches with `input_ids`, `attention_mask` and `labels` (-100 on the question and the padding, on the
    answer the input ids themselves): each sample's answer is replaced by one of the given ones, the same in each epoch.

    Args:
        answers: Token ids of each answer, with the token that ends it.
        beta: As for `DPO`.
        seed: Which sample gets which answer.
        key: A function of the batch that returns an int64 `[N]`; default: what the samples' tensors hold.
        reference: As for `DPO`.
        outputs: How to ask the models.

    Raises:
        HAMUValueError: If there is no answer, or (at the first batch) the batch has another form.
    """

    def __init__(
        self,
        answers: Sequence[Sequence[int]],
        beta: float = 0.1,
        *,
        seed: int = 0,
        key: Key | None = None,
        reference: Reference | None = None,
        outputs: Outputs | None = None,
    ) -> None:
        check_type("answers", answers, Sequence, "lists of token ids")
        if not answers or not all(isinstance(answer, Sequence) and answer for answer in answers):
            raise HAMUValueError(f"Expected `answers` to be lists of token ids, but got {describe(answers)}.")
        super().__init__(beta=beta, reference=reference, outputs=outputs)
        self.answers = [[check_count("token id", token, least=0) for token in answer] for answer in answers]
        self.seed, self.key = check_seed(seed), as_key(key)

    @override
    def find_pair(self, batch: Any) -> tuple[Any, Any]:
        if not isinstance(batch, Mapping) or not {"input_ids", "attention_mask", "labels"} <= batch.keys():
            raise HAMUValueError(
                "Expected a mapping with 'input_ids', 'attention_mask' and 'labels' to put other answers in, but got "
                f"a {type(batch).__name__}. DPO(preferred=...) takes preferred answers of every form."
            )
        labels = batch["labels"]
        longest = max(map(len, self.answers))
        padded = [[*answer, *[IGNORED] * (longest - len(answer))] for answer in self.answers]
        drawn = draw_below(len(padded), self.key(batch), self.seed)
        answers = torch.tensor(padded, dtype=labels.dtype, device=labels.device)[drawn]  # [N, longest]
        return replace_answers(batch["input_ids"], batch["attention_mask"], labels, answers), batch


def replace_answers(inputs: Tensor, attention: Tensor, labels: Tensor, answers: Tensor) -> dict[str, Tensor]:
    """Put other answers behind the questions.

    Args:
        inputs: Token ids `[N, T]`: a question, then an answer, with padding on either side.
        attention: `[N, T]`, 0 on the padding.
        labels: `[N, T]`, -100 everywhere but on the answer.
        answers: The new answers, `[N, L]`, -100 behind their ends.

    Returns:
        The same of length T + L: padding, question, new answer, padding.
    """
    room = answers.shape[1]
    begins = (labels != IGNORED).long().argmax(1, keepdim=True)  # [N, 1]
    places = torch.arange(labels.shape[1] + room, device=labels.device).unsqueeze(0)
    is_question = places < begins
    offsets = places - begins
    new = answers.gather(1, offsets.clamp(0, room - 1))
    is_answer = ~is_question & (offsets < room) & (new != IGNORED)

    def widened(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(len(tensor), room)], dim=1)

    return {
        "input_ids": torch.where(is_answer, new, torch.where(is_question, widened(inputs), 0)),
        "attention_mask": torch.where(is_question, widened(attention), is_answer.to(attention.dtype)),
        "labels": torch.where(is_answer, new, IGNORED),
    }
