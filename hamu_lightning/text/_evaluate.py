"""Asks a language model about parts of the data, in evaluation mode and without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from hamu_lightning.checks import check_count, check_number, check_optional, check_seed, check_type, store
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional import (
    exact_memorization,
    extraction_strength,
    min_k_scores,
    token_losses,
    truth_ratio,
)
from hamu_lightning.objectives import ModuleOutputs, Outputs, evaluating
from hamu_lightning.randomness import RandomStream
from hamu_lightning.text._answers import contains_spans, find_generator, is_gibberish, rouge_l_recall, write_answers
from hamu_lightning.text._data import TextDataset
from hamu_lightning.text._encoding import Encoded, Encoder, PadCollator
from hamu_lightning.text._layouts import QARecord
from hamu_lightning.text._scores import FORGET, TextEvaluation, TextRow, TextScores

Part: TypeAlias = "TextDataset | Sequence[QARecord]"
Found = TypeVar("Found")


@dataclass(frozen=True)
class TextSettings:
    """How a language model is asked.

    Args:
        batch_size: In records, and in answers that are generated at once.
        most: At most so many records of each part, spread evenly over it; None: all. The numbers' `n` says how many.
        max_new_tokens: An answer ends there; 0: none is generated.
        min_k: The share of the tokens that Min-K% looks at; MUSE takes 0.4, its paper 0.2.
        samples: How many answers to each question of the forget part are sampled; 0: none, and no leak@k.
        k: How many answers somebody would sample, at most `samples`.
        seed: Of the samples, which also depend on `batch_size` and on the number of processes.

    Raises:
        HAMUValueError: If a number is out of range.

    Example:
        >>> TextSettings(samples=4, k=8)
        Traceback (most recent call last):
        ...
        hamu_lightning.errors.HAMUValueError: Expected `k` to be at most 4, but got 8. Sample at least k answers.
    """

    batch_size: int = 8
    most: int | None = None
    max_new_tokens: int = 64
    min_k: float = 0.4
    samples: int = 0
    k: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        samples = check_count("samples", self.samples, least=0)
        store(
            self,
            batch_size=check_count("batch_size", self.batch_size),
            most=check_optional(check_count, "most", self.most),
            max_new_tokens=check_count("max_new_tokens", self.max_new_tokens, least=0),
            min_k=check_number("min_k", self.min_k, above=0, most=1, wanted="above 0 and at most 1"),
            samples=samples,
            k=check_count("k", self.k, most=max(samples, 1), cure="Sample at least k answers."),
            seed=check_seed(self.seed),
        )


def evaluate_text(
    module: nn.Module,
    parts: Mapping[str, Part],
    tokenizer: Any = None,
    settings: TextSettings | None = None,
    *,
    outputs: Outputs | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> TextEvaluation:
    """Ask a language model about parts of the data: likelihoods, and what it answers.

    In evaluation mode and without gradients; modes and random numbers are what they were afterwards. Where processes
    train together, each asks about its share of the records, and all get the whole result; where weights are sharded
    over them, each asks about all.

    Args:
        module: A module with `generate` in it or in a part of it, such as `CausalLMModule`, or a model of transformers.
        parts: For "forget", "retain", "holdout" and others (TOFU's "real_authors", "world_facts") a `TextDataset`, or a
            list of `QARecord`. The right answer beside wrong ones is the paraphrase, where there is one.
        tokenizer: For parts that are lists.
        settings: How much is asked.
        outputs: How logits and labels are got; default: `ModuleOutputs()`.
        precision: Makes the context in which the model runs, such as autocast.

    Returns:
        A `TextEvaluation`; its `numbers(reference)` has the metrics.

    Raises:
        HAMUValueError: If parts are of another kind, or nothing generates.
    """
    settings = TextSettings() if settings is None else settings
    check_type("parts", parts, Mapping, "a dict from names to datasets")
    datasets = {name: as_dataset(part, tokenizer) for name, part in parts.items()}
    if settings.max_new_tokens:
        find_generator(module)
    rank, world = place(module)
    stream = RandomStream(settings.seed, rank)
    scorer = _Scorer(module, settings, outputs or ModuleOutputs(), precision)
    found: dict[str, list[tuple[int, TextRow]]] = {}
    with torch.no_grad(), evaluating(module), stream.active():
        for name, dataset in datasets.items():
            chosen = spread_over(len(dataset), settings.most)[rank::world]
            found[name] = list(scorer.rows(dataset, chosen, samples=settings.samples if name == FORGET else 0))
    rows = gather(found, world)
    return TextEvaluation({name: TextScores(rows[name]) for name in parts}, settings.k)


@dataclass(frozen=True)
class _Scorer:
    module: nn.Module
    settings: TextSettings
    outputs: Outputs
    precision: Callable[[], AbstractContextManager[Any]]
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        store(self, device=next(self.module.parameters()).device)

    def rows(self, dataset: TextDataset, indices: Sequence[int], samples: int) -> Iterator[tuple[int, TextRow]]:
        """Yield for each index what the model says of its record."""
        for chunk in chunks(indices, self.settings.batch_size):
            records = [dataset.record(i) for i in chunk]
            rows = self._likelihoods(dataset.encoder, records, [dataset.ids[i] for i in chunk])
            if self.settings.max_new_tokens:
                rows = self._answers(dataset.encoder, records, rows, samples)
            yield from zip(chunk, rows, strict=True)

    def _likelihoods(self, encoder: Encoder, records: list[QARecord], ids: list[int]) -> list[TextRow]:
        rows = []
        samples = [encoder.encode(record) for record in records]
        for i, record, (logits, labels) in zip(ids, records, self._predict(encoder, samples), strict=True):
            row = TextRow(
                i,
                loss=_loss(logits, labels),
                exact=float(exact_memorization(logits, labels)),
                extraction=float(extraction_strength(logits, labels)),
                min_k=float(min_k_scores(logits, labels, self.settings.min_k)),
            )
            rows.append(self._beside_wrong(encoder, record, row) if record.perturbed else row)
        return rows

    def _beside_wrong(self, encoder: Encoder, record: QARecord, row: TextRow) -> TextRow:
        right = record.answer if record.paraphrased is None else record.paraphrased
        samples = [encoder.encode(record, answer) for answer in (right, *record.perturbed)]
        right_loss, *losses = (_loss(*pair) for pair in self._predict(encoder, samples))
        log_p = torch.tensor([losses], dtype=torch.float64).neg()
        of_right = torch.tensor([-right_loss], dtype=torch.float64)
        options = torch.cat([torch.tensor([-row.loss], dtype=torch.float64), log_p[0]])
        return replace(
            row,
            truth_ratio=float(truth_ratio(of_right, log_p)),
            truth_ratio_geometric=float(truth_ratio(of_right, log_p, "geometric")),
            share_of_options=float(options.softmax(dim=0)[0]),
        )

    def _answers(self, encoder: Encoder, records: list[QARecord], rows: list[TextRow], samples: int) -> list[TextRow]:
        asked = [i for i, record in enumerate(records) if record.question is not None]
        questions, rows = [records[i] for i in asked], list(rows)
        if not asked:
            return rows
        greedy = self._write(encoder, questions, 0)
        drawn = [self._write(encoder, [r], samples)[0] for r in questions] if samples else [None] * len(asked)
        for i, (answer,), others in zip(asked, greedy, drawn, strict=True):
            rows[i] = replace(
                rows[i],
                rouge=rouge_l_recall(answer, records[i].answer),
                spans=contains_spans(answer, records[i].spans) if records[i].spans else None,
                gibberish=is_gibberish(answer),
                leaks=None if others is None else tuple(_leak(other, records[i]) for other in others),
                question=records[i].question,
                answer=answer,
            )
        return rows

    def _write(self, encoder: Encoder, records: list[QARecord], samples: int) -> list[list[str]]:
        with self.precision():
            return write_answers(self.module, encoder, records, self.settings.max_new_tokens, samples)

    def _predict(self, encoder: Encoder, samples: list[Encoded]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each sample the logits `[1, t, V]` and labels `[1, t]` of its answer's tokens."""
        for chunk in chunks(samples, self.settings.batch_size):
            batch = {name: x.to(self.device) for name, x in PadCollator(encoder.pad_id)(chunk).items()}
            with self.precision():
                logits, labels = self.outputs(self.module, batch)
            for scores, targets in zip(logits, labels, strict=True):
                is_answer = targets != -100
                yield scores[is_answer][None], targets[is_answer][None]


def _loss(logits: Tensor, labels: Tensor) -> float:
    return float(token_losses(logits, labels).samples)


def _leak(answer: str, record: QARecord) -> float:
    return float(contains_spans(answer, record.spans)) if record.spans else rouge_l_recall(answer, record.answer)


def as_dataset(part: Part, tokenizer: Any) -> TextDataset:
    """A part as a dataset of records with their own answers.

    Raises:
        HAMUValueError: If it is of another kind.
    """
    if isinstance(part, TextDataset):
        if part.answers != "answer":
            raise HAMUValueError(
                f"Expected a part with its own answers, but got one with {part.answers!r}. "
                "Paraphrases and wrong answers are asked about by themselves."
            )
        return part
    check_type("a part", part, Sequence, "a TextDataset or a list of QARecord")
    if tokenizer is None:
        raise HAMUValueError("Expected `tokenizer` for parts that are lists, but got None.")
    return TextDataset(part, tokenizer)


def place(module: nn.Module) -> tuple[int, int]:
    """Which share of the records this process asks about: the first of one, where weights are sharded."""
    is_alone = not (distributed.is_available() and distributed.is_initialized())
    if is_alone or any(isinstance(weight, DTensor) for weight in module.parameters()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gather(found: dict[str, list[tuple[int, Found]]], world: int) -> dict[str, list[Found]]:
    """What all processes have found of each part, in the order of the records."""
    shares: list[Any] = [found]
    if world > 1:
        shares = [None] * world
        distributed.all_gather_object(shares, found)
    pairs = {name: sorted((p for share in shares for p in share[name]), key=lambda pair: pair[0]) for name in found}
    return {name: [row for _, row in rows] for name, rows in pairs.items()}


def spread_over(length: int, most: int | None) -> list[int]:
    """So many places at most, spread evenly over a length."""
    count = length if most is None else min(length, most)
    return [i * length // count for i in range(count)]


def chunks(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Items in lists of a size."""
    return (list(items[i : i + size]) for i in range(0, len(items), size))
