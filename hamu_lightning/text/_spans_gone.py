"""A check before a target counts as reached: the given spans do not come out any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hamu_lightning.checks import check_count, check_number, check_optional, check_seed, check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives import evaluating
from hamu_lightning.randomness import RandomStream
from hamu_lightning.text._answers import contains_spans, find_generator, write_answers
from hamu_lightning.text._evaluate import Part, as_dataset, chunks, gather, place, spread_over
from hamu_lightning.text._layouts import QARecord
from hamu_lightning.text._scores import FORGET, TextEvaluation


class SpansGone:
    """Says whether the given spans still come out of a language model: `HAMUCallback(..., confirm=SpansGone(part))`.

    Asks the questions of all records that have spans, greedily, and with `samples` also by answers drawn at temperature
    1. It passes where

        records whose greedy answer holds one of their spans              <= allowed
        share of records of which one of `samples` answers holds one      <= leak + the same share of the reference

    In evaluation mode and without a trace. Where processes train together, each asks about its share of the records.

    Args:
        part: What is forgotten: a `TextDataset` or a list of `QARecord`, with `spans`.
        tokenizer: For a list.
        samples: How many answers to each question are drawn; 0: the greedy one alone.
        allowed: Of how many records the greedy answer may hold a span.
        leak: What share of the records may come out of the samples, beyond the reference's.
        reference: What a retrained model said, asked with at least as many samples; None: nothing of it comes out.
        most: At most so many records are asked, spread evenly over them, and the words say so; None: all. Nothing is
            known of the others.
        max_new_tokens: An answer ends there.
        batch_size: In answers that are generated at once.
        seed: Of the samples.

    Raises:
        HAMUValueError: If an argument is out of its range, or no record has a question and spans.
    """

    def __init__(
        self,
        part: Part,
        tokenizer: Any = None,
        *,
        samples: int = 0,
        allowed: int = 0,
        leak: float = 0.1,
        reference: TextEvaluation | None = None,
        most: int | None = None,
        max_new_tokens: int = 64,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        dataset = as_dataset(part, tokenizer)
        self.samples = check_count("samples", samples, least=0)
        self.allowed = check_count("allowed", allowed, least=0)
        self.leak = check_number("leak", leak, least=0, most=1)
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        self.batch_size, self.seed = check_count("batch_size", batch_size), check_seed(seed)
        self._encoder = dataset.encoder
        found = (dataset.record(i) for i in range(len(dataset)))
        known = [record for record in found if record.spans and record.question is not None]
        if not known:
            raise HAMUValueError(
                "Expected records with a question and `spans`, what must not come out, but got none. Give the records "
                "a column `spans`."
            )
        chosen = spread_over(len(known), check_optional(check_count, "most", most))
        self._records, self._total = [known[i] for i in chosen], len(known)
        check_type("reference", reference, TextEvaluation | None, "what evaluate_text returned for a retrained model")
        self._of_reference = 0.0 if reference is None or not samples else _share_of(reference, samples)

    def __call__(self, module: nn.Module) -> str:
        """Return what still comes out, in words and counts; "" where nothing speaks against it."""
        find_generator(module)
        rank, world = place(module)
        own = self._records[rank::world]
        with torch.no_grad(), evaluating(module), RandomStream(self.seed, rank).active():
            rows = [
                (i * world + rank, found)
                for i, found in enumerate(zip(self._greedy(module, own), self._drawn(module, own), strict=True))
            ]
        found = gather({FORGET: rows}, world)[FORGET]
        return self._explain(sum(greedy for greedy, _ in found), sum(drawn for _, drawn in found))

    def _greedy(self, module: nn.Module, records: Sequence[QARecord]) -> list[bool]:
        return [
            contains_spans(answer, record.spans)
            for chunk in chunks(records, self.batch_size)
            for record, (answer,) in zip(
                chunk, write_answers(module, self._encoder, chunk, self.max_new_tokens), strict=True
            )
        ]

    def _drawn(self, module: nn.Module, records: Sequence[QARecord]) -> list[bool]:
        if not self.samples:
            return [False] * len(records)
        return [
            any(
                contains_spans(answer, record.spans)
                for answer in write_answers(module, self._encoder, [record], self.max_new_tokens, self.samples)[0]
            )
            for record in records
        ]

    def _explain(self, greedy: int, drawn: int) -> str:
        n, told = len(self._records), []
        of = f"{n} records" if n == self._total else f"{n} of {self._total} records that were asked"
        if greedy > self.allowed:
            told.append(f"the greedy answers to {greedy} of {of} hold a given span (allowed: {self.allowed})")
        bound = self.leak + self._of_reference
        if drawn / n > bound:
            told.append(f"of {drawn} of {of} one of {self.samples} sampled answers does (allowed: {100 * bound:.0f} %)")
        return ", and ".join(told)


def _share_of(reference: TextEvaluation, samples: int) -> float:
    """The share of the reference's records of which one of the first so many answers held a span.

    Raises:
        HAMUValueError: If it was not asked with as many.
    """
    leaks = [row.leaks for row in reference.parts[FORGET].rows if row.leaks is not None and row.spans is not None]
    if not leaks or any(len(found) < samples for found in leaks):
        raise HAMUValueError(
            f"Expected a reference that was asked with at least {samples} samples about the forgotten records, but it "
            f"was not. Ask it again: evaluate_text(retrained, parts, settings=TextSettings(samples={samples}))."
        )
    return sum(any(leak > 0 for leak in found[:samples]) for found in leaks) / len(leaks)
