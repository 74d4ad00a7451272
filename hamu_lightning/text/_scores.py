"""What a language model says of parts of the data, record by record, and the numbers that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional import (
    Estimate,
    auc,
    forget_quality,
    leak_at_k,
    mean_estimate,
    model_utility,
    priv_leak,
    rate_estimate,
    truth_ratio_of_forgotten,
    truth_ratio_of_kept,
    undefined,
)

FORGET, RETAIN, HOLDOUT = "forget", "retain", "holdout"
# Not among the parts whose utility counts.
_NO_UTILITY = (FORGET, HOLDOUT, "test")


@dataclass(frozen=True)
class TextRow:
    """What a model says of one record; None where the record has nothing to be judged by.

    Attributes:
        id: The record's number.
        loss: Mean loss over the answer's tokens, nats.
        exact: Share of the answer's tokens that greedy decoding gets right after the true beginning.
        extraction: 1 - share of the answer after which greedy decoding gives the rest.
        min_k: Mean log-probability of the answer's least likely tokens, nats.
        truth_ratio: Wrong answers by the right one, arithmetic mean; needs wrong answers.
        truth_ratio_geometric: The same with the geometric mean.
        share_of_options: Probability of the answer by the sum over it and the wrong answers, each per token.
        rouge: ROUGE-L recall of the greedy answer; needs a question, as all below.
        spans: Whether one of the record's spans stands in the greedy answer; needs spans.
        gibberish: Whether the greedy answer is gibberish.
        leaks: For each sampled answer, whether a span stands in it; without spans its ROUGE-L recall.
        question: The question.
        answer: The greedy answer.
    """

    id: int
    loss: float
    exact: float
    extraction: float
    min_k: float
    truth_ratio: float | None = None
    truth_ratio_geometric: float | None = None
    share_of_options: float | None = None
    rouge: float | None = None
    spans: bool | None = None
    gibberish: bool | None = None
    leaks: tuple[float, ...] | None = None
    question: str | None = field(default=None, repr=False)
    answer: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class TextScores:
    """What a model says of the records of one part, in the order of the part."""

    rows: Sequence[TextRow]

    def column(self, name: str) -> Tensor:
        """Return one number per record, float64 `[N]`, of the records that have it."""
        found = [value for value in (getattr(row, name) for row in self.rows) if value is not None]
        return torch.tensor([float(value) for value in found], dtype=torch.float64)

    def mean(self, name: str, why: str = "no record was given") -> Estimate:
        """Return the mean of a column in [0, 1]; NaN with a reason where no record has it."""
        values = self.column(name)
        return mean_estimate(values, name, limits=(0, 1)) if len(values) else undefined(why, (0,))

    def share(self, name: str, why: str) -> Estimate:
        """Return the share of records for which a column is true, with Wilson's interval."""
        values = self.column(name)
        return rate_estimate(int(values.sum()), len(values)) if len(values) else undefined(why, (0,))


@dataclass(frozen=True)
class TextEvaluation:
    """What one model says of the parts of the data: "forget", "retain", "holdout", and others such as "world_facts".

    Attributes:
        parts: The scores, by name.
        k: Of leak@k.

    Raises:
        HAMUValueError: If there is no part.

    Example:
        >>> rows = [TextRow(0, 0.5, 1.0, 1.0, -0.7, rouge=1.0), TextRow(1, 1.5, 0.5, 0.2, -2.0, rouge=0.5)]
        >>> numbers = TextEvaluation({"forget": TextScores(rows)}).numbers()
        >>> print(numbers["forget/rouge_l_recall"].value, numbers["min_k_auc"], sep="; ")
        0.75; nan: no holdout record was given
    """

    parts: Mapping[str, TextScores]
    k: int = 1

    def __post_init__(self) -> None:
        """Check that there are parts."""
        if not self.parts:
            raise HAMUValueError("Expected at least one part of the data, but got none. Give {'forget': dataset}.")
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made anew: a view of a dict cannot be one."""
        return TextEvaluation, (dict(self.parts), self.k)

    def numbers(self, reference: TextEvaluation | None = None) -> dict[str, Estimate]:
        """Return all numbers by name; NaN with its reason where something is missing.

        Of each part: "<part>/loss" (nats), "/probability" (of the right answer, per token), "/rouge_l_recall",
        "/truth_ratio" and "/truth_ratio_geometric" (for "forget" the mean of min(R, 1/R), for others of max(0, 1-R)),
        "/exact_memorization", "/extraction_strength", "/min_k" (nats), "/spans" (share of greedy answers that hold one
        of the record's spans), "/gibberish".

        Of the model: "leak_at_k" of the forget part; "min_k_auc" of forget against held-out records and "priv_leak"
        from it; "forget_quality" and "forget_quality_geometric"; "model_utility", the harmonic mean over all parts but
        forget, holdout and test of probability (for others than "retain" as a share of the options), ROUGE-L recall and
        truth ratio.

        Args:
            reference: The same parts under a retrained model; without one the forget quality is NaN, and PrivLeak
                compares with an AUC of 0.5.
        """
        found = {f"{part}/{name}": e for part in self.parts for name, e in self._of_part(part).items()}
        member = self._membership()
        retrained = 0.5 if reference is None else reference._membership()
        return {
            **found,
            "leak_at_k": self._leaks(),
            "min_k_auc": member,
            "priv_leak": priv_leak(member, retrained),
            "forget_quality": self._quality("truth_ratio", reference),
            "forget_quality_geometric": self._quality("truth_ratio_geometric", reference),
            "model_utility": model_utility(self._utilities()),
        }

    def _of_part(self, name: str) -> dict[str, Estimate]:
        part = self.parts[name]
        losses = part.column("loss")
        unasked = "no answer was generated"
        return {
            "loss": mean_estimate(losses, "losses"),
            "probability": mean_estimate((-losses).exp(), "probabilities", limits=(0, 1)),
            "rouge_l_recall": part.mean("rouge", unasked),
            "truth_ratio": _truth(part, "truth_ratio", name == FORGET),
            "truth_ratio_geometric": _truth(part, "truth_ratio_geometric", name == FORGET),
            "exact_memorization": part.mean("exact"),
            "extraction_strength": part.mean("extraction"),
            "min_k": mean_estimate(part.column("min_k"), "scores"),
            "spans": part.share("spans", "no record with a question has spans, or no answer was generated"),
            "gibberish": part.share("gibberish", unasked),
        }

    def _membership(self) -> Estimate:
        missing = [name for name in (FORGET, HOLDOUT) if name not in self.parts or not self.parts[name].rows]
        if missing:
            return undefined(f"no {missing[0]} record was given", ideal=0.5)
        return auc(self.parts[FORGET].column("min_k"), self.parts[HOLDOUT].column("min_k"))

    def _leaks(self) -> Estimate:
        rows = self.parts[FORGET].rows if FORGET in self.parts else ()
        leaks = [row.leaks for row in rows if row.leaks]
        if not leaks:
            return undefined("no answer of the forget part was sampled", (0,))
        return leak_at_k(torch.tensor(leaks, dtype=torch.float64), self.k)

    def _quality(self, name: str, reference: TextEvaluation | None) -> Estimate:
        ours = self._column_of_forget(name)
        if not len(ours):
            return undefined("no forget record has wrong answers", (0,))
        return forget_quality(ours, None if reference is None else reference._column_of_forget(name))

    def _column_of_forget(self, name: str) -> Tensor:
        return self.parts[FORGET].column(name) if FORGET in self.parts else torch.empty(0, dtype=torch.float64)

    def _utilities(self) -> dict[str, Estimate]:
        found = {}
        for name, part in self.parts.items():
            if name in _NO_UTILITY:
                continue
            numbers = self._of_part(name)
            probability = numbers["probability"]
            if name != RETAIN:
                probability = part.mean("share_of_options", "no record has wrong answers")
            found[f"{name}/probability"] = probability
            found |= {f"{name}/{score}": numbers[score] for score in ("rouge_l_recall", "truth_ratio")}
        return found


def _truth(part: TextScores, name: str, is_forgotten: bool) -> Estimate:
    ratios = part.column(name)
    if not len(ratios):
        return undefined("no record has wrong answers", (0,))
    measure: Callable[[Tensor], Estimate] = truth_ratio_of_forgotten if is_forgotten else truth_ratio_of_kept
    return measure(ratios)
