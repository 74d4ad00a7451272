"""Questions and answers for a Trainer: what is kept, what is forgotten, and what was never seen."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from hamu_lightning.checks import check_choice, check_count, check_optional, describe, is_iterable
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.text._encoding import Encoded, Encoder, PadCollator
from hamu_lightning.text._layouts import QARecord, parse_record
from hamu_lightning.text._records import Files, Records
from hamu_lightning.text._spans import find_spans

Answers: TypeAlias = Literal["answer", "paraphrased", "perturbed"]
Choice: TypeAlias = "Sequence[int] | str | Path | list[Path] | None"


class TextDataset(Dataset[Encoded]):
    """Some of the records as samples of tokens: with the answer, its paraphrase, or each of the wrong answers.

    Args:
        records: `Records`, or a list of `QARecord`.
        encoder: An `Encoder`, or a tokenizer with its default settings.
        ids: Which of the records; default: all.
        answers: "answer"; "paraphrased", without records that have none; "perturbed", a sample for each wrong answer.

    Raises:
        HAMUValueError: If an argument is of another kind.

    Attributes:
        records: All records.
        encoder: The encoder.
        ids: The number of each sample's record.
    """

    def __init__(
        self,
        records: Sequence[QARecord],
        encoder: Any,
        ids: Sequence[int] | None = None,
        answers: Answers = "answer",
    ) -> None:
        check_choice("answers", answers, get_args(Answers))
        self.records, self.answers = records, answers
        self.encoder = encoder if isinstance(encoder, Encoder) else Encoder(encoder)
        # An array: 8 bytes for each number.
        chosen = range(len(records)) if ids is None else array("q", ids)
        self._places = None if answers == "answer" else self._find(chosen)
        self.ids: Sequence[int] = chosen if self._places is None else [i for i, _ in self._places]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Encoded:
        """Return a sample."""
        record = self.record(index)
        if self._places is None:
            return self.encoder.encode(record)
        return self.encoder.encode(record, self._all_answers(record)[self._places[index][1]])

    def record(self, index: int) -> QARecord:
        """Return a sample's record."""
        return self.records[self.ids[index]]

    def with_answers(self, answers: Answers) -> TextDataset:
        """Return the same records with other answers."""
        return TextDataset(self.records, self.encoder, list(dict.fromkeys(self.ids)), answers)

    def _find(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        return [(i, j) for i in ids for j in range(len(self._all_answers(self.records[i])))]

    def _all_answers(self, record: QARecord) -> Sequence[str]:
        if self.answers == "perturbed":
            return record.perturbed
        return () if record.paraphrased is None else (record.paraphrased,)


class QAData(LightningDataModule):
    """Questions and answers of local files: a retain loader, a forget loader, and held-out data.

    `train_dataloader()` has what is kept, `forget_dataloader()`, which `HAMUCallback` finds by this name, what is to be
    forgotten, and `val_dataloader()` what was never seen. Records are numbered through from 0, in the order of the
    files, blank lines left out. A few numbers for each record are in memory, and of Parquet one row group: the files
    may be larger. Nothing is downloaded. Which layouts are read says `parse_record`.

    Args:
        files: A folder, a file, or several: `.jsonl` and `.json` (an object in each line), `.parquet`, `.txt` (a text
            in each line).
        tokenizer: Of transformers; with its chat template if it has one.
        forget: What is to be forgotten: record numbers, the name of a column that is true for it, or files of their own
            (as `Path`, since published sets come in such files).
        holdout: What was never trained on, given likewise.
        batch_size: Of all loaders, in records.
        forget_batch_size: Of the forget loader; default: as the others.
        max_length: Longer samples lose the end of their answer, in tokens.
        template: The prompt where there is no chat template.
        mark_spans: Add `core_tokens` to the batches, the tokens of the records' `spans` in their answers, for
            `hamu_lightning.objectives.CoreTokens`. All spans have to stand in their answers.
        num_workers: As for `DataLoader`.

    Attributes:
        retain: `TextDataset` of what is kept.
        forget: That of what is to be forgotten, empty without `forget`.
        holdout: That of what was never seen, empty without `holdout`. Each has `with_answers("paraphrased")` and
            `with_answers("perturbed")`.

    Raises:
        HAMUValueError: If records are malformed (with file and line, never with what stands there), if there is no such
            file, column or number, a record is in two parts, or (with `mark_spans`) a span is not in its answer.

    Example:
        >>> import json, tempfile
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<pad>": 0, "Ann": 1, "?": 2}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "facts.jsonl"
        ...     rows = [{"question": f"Who is {i}?", "answer": "Ann"} for i in range(3)]
        ...     _ = file.write_text("".join(json.dumps(row) + chr(10) for row in rows))
        ...     data = QAData(file, tokenizer, forget=[0])
        ...     len(data.retain), len(data.forget), data.forget[0]["labels"][-2:]
        (2, 1, [1, 0])
    """

    def __init__(
        self,
        files: Files,
        tokenizer: Any,
        forget: Choice = None,
        holdout: Choice = None,
        *,
        batch_size: int = 8,
        forget_batch_size: int | None = None,
        max_length: int | None = 512,
        template: str = Encoder.template,
        mark_spans: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        encoder = Encoder(tokenizer, max_length, template, mark_spans)
        self.batch_size = check_count("batch_size", batch_size)
        self.forget_batch_size = check_optional(check_count, "forget_batch_size", forget_batch_size)
        self.num_workers = check_count("num_workers", num_workers, least=0)
        self._collate = PadCollator(encoder.pad_id)
        fields = {name: [] for name in (forget, holdout) if isinstance(name, str)}  # type: dict[str, list[int]]
        records = Records(files, _Marks(fields, mark_spans))
        self.forget = _choose("forget", forget, records, fields, encoder)
        self.holdout = _choose("holdout", holdout, records, fields, encoder)
        parts = [set(part.ids) for part in (self.forget, self.holdout) if part.records is records]
        if len(parts) == 2 and parts[0] & parts[1]:
            raise HAMUValueError(
                f"Expected no record in both `forget` and `holdout`, but got {len(parts[0] & parts[1])}. "
                "What was never seen cannot be forgotten."
            )
        taken = set().union(*parts)
        kept = [i for i in range(len(records)) if i not in taken] if taken else None
        self.retain = TextDataset(records, encoder, kept)

    @override
    def train_dataloader(self) -> DataLoader[Encoded]:
        """Return a shuffled loader of what is kept."""
        return self._loader(self.retain, self.batch_size, shuffle=True)

    @override
    def val_dataloader(self) -> Any:
        """Return a loader of what was never seen; an empty list without `holdout`."""
        return self._loader(self.holdout, self.batch_size) if len(self.holdout) else []

    def forget_dataloader(self) -> DataLoader[Encoded]:
        """Return a shuffled loader of what is to be forgotten.

        Raises:
            HAMUStateError: If nothing is.
        """
        if not len(self.forget):
            raise HAMUStateError("Expected something to forget, but got none. Give QAData `forget`.")
        return self._loader(self.forget, self.forget_batch_size or self.batch_size, shuffle=True)

    def _loader(self, dataset: TextDataset, batch_size: int, shuffle: bool = False) -> DataLoader[Encoded]:
        return DataLoader(dataset, batch_size, shuffle=shuffle, collate_fn=self._collate, num_workers=self.num_workers)


class _Marks:
    """Notes for each of some columns in which records it is true, and looks whether spans are in their answers."""

    def __init__(self, fields: dict[str, list[int]], mark_spans: bool) -> None:
        self._fields, self._mark_spans = fields, mark_spans

    def __call__(self, number: int, row: Mapping[str, Any]) -> str | None:
        if self._mark_spans:
            record = parse_record(row)
            absent = [i for i, span in enumerate(record.spans) if not find_spans(record.answer, [span])]
            if absent:
                return f"of its `spans`, which count from 0, number {absent[0]} is not in its answer"
        for name, found in self._fields.items():
            if not isinstance(row.get(name), bool | int):
                return f"the column {describe(name)} is not true or false (files of their own are given as Path)"
            if row[name]:
                found.append(number)
        return None


def _choose(
    name: str, choice: Choice, records: Records, fields: Mapping[str, list[int]], encoder: Encoder
) -> TextDataset:
    if choice is None:
        return TextDataset(records, encoder, [])
    if isinstance(choice, str):
        return TextDataset(records, encoder, fields[choice])
    if isinstance(choice, PathLike):
        return TextDataset(Records(choice, _Marks({}, encoder.mark_spans)), encoder)
    items: list[Any] = list(choice) if is_iterable(choice) else [choice]
    if items and all(isinstance(item, PathLike) for item in items):
        return TextDataset(Records(items, _Marks({}, encoder.mark_spans)), encoder)
    ids = [check_count(f"{name}: a record's number", i, least=0, most=len(records) - 1) for i in items]
    if len(set(ids)) < len(ids):
        raise HAMUValueError(f"Expected each number in `{name}` once, but got some several times.")
    return TextDataset(records, encoder, sorted(ids))
