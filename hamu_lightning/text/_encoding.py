"""From records to tokens: prompt and answer apart, labels for the answer alone, batches padded to their longest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from hamu_lightning.checks import check_count, check_flag, check_optional, check_type, store
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.text._layouts import QARecord
from hamu_lightning.text._spans import mark_tokens, places_by_decoding

_IGNORED = -100
# The entry that `hamu_lightning.objectives.CoreTokens` reads.
CORE = "core_tokens"


class Encoded(TypedDict):
    """One sample: token ids, labels that are a copy of them, -100 for the prompt, and which tokens are of spans."""

    input_ids: list[int]
    labels: list[int]
    core_tokens: NotRequired[list[int]]


@dataclass(frozen=True)
class _Written:
    """Tokens of an answer, and where they stand in a text; without places where the tokenizer does not tell."""

    ids: list[int]
    text: str
    places: list[tuple[int, int]] | None = None

    def ended_by(self, token: int | None) -> _Written:
        ends = [] if token is None else [token]
        places = None if self.places is None else [*self.places, *((0, 0) for _ in ends)]
        return _Written(self.ids + ends, self.text, places)


@dataclass(frozen=True)
class Encoder:
    """Turns a record into tokens and labels.

    With a chat template: the user's turn is the question, the assistant's turn the answer, and the labels begin where
    the template would have the assistant speak. Without one: `template` and the answer after a blank, ended by the
    end-of-text token. Both are tokenized together, and a token belongs to the answer if one of its characters does;
    with a slow tokenizer, which does not tell, they are tokenized apart. A text without a question has labels from its
    beginning on.

    Args:
        tokenizer: Of transformers.
        max_length: Longer samples lose the end of their answer; None: nothing is cut.
        template: The prompt where the tokenizer has no chat template, with `{question}` in it.
        mark_spans: Add `core_tokens`: 1 for the tokens of the record's spans in the answer, 0 for others.

    Raises:
        HAMUValueError: If the template has no place for the question, or the length is no count.
    """

    tokenizer: Any
    max_length: int | None = None
    template: str = "Question: {question}\nAnswer:"
    mark_spans: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        store(self, max_length=check_optional(check_count, "max_length", self.max_length, least=2))
        check_flag("mark_spans", self.mark_spans)
        check_type("template", self.template, str, "a text with `{question}` in it")
        if "{question}" not in self.template:
            raise HAMUValueError(
                "Expected `template` to say where the question goes, but got none. Write {question} into it."
            )
        if not callable(self.tokenizer):
            raise HAMUValueError(
                f"Expected `tokenizer` to be one of transformers, but got {type(self.tokenizer).__name__}. "
                "Load it with AutoTokenizer.from_pretrained(folder, local_files_only=True)."
            )

    def encode(self, record: QARecord, answer: str | None = None) -> Encoded:
        """Return tokens and labels of a record; `answer` may be another one than its own.

        Raises:
            HAMUValueError: If the prompt leaves no room for an answer, or the text has no token to predict.
        """
        prompt, written = self._split(record, record.answer if answer is None else answer)
        target = written.ids
        ids = (prompt + target)[: self.max_length]
        masked = [_IGNORED] * len(prompt)
        labels = (masked + ids[len(masked) :])[: len(ids)]
        if all(label == _IGNORED for label in labels[1:]):
            raise HAMUValueError(
                f"Expected a prompt of fewer than {self.max_length or 'any'} tokens and an answer, but got a prompt of "
                f"{len(prompt)} and an answer of {len(target)}. Raise `max_length`."
            )
        if not self.mark_spans:
            return {"input_ids": ids, "labels": labels}
        core = [0] * len(prompt) + self._mark(written, record.spans)
        return {"input_ids": ids, "labels": labels, "core_tokens": core[: len(ids)]}

    def prompt(self, record: QARecord) -> list[int]:
        """Return the tokens that the answer follows; of a text without a question those that begin every text."""
        if record.question is None:
            return self._begin("")
        if self._has_chat:
            return self._tokenize(self._chat(record.question))
        return self._begin(self.template.replace("{question}", record.question))

    @property
    def pad_id(self) -> int:
        """What fills batches up: the padding token, else the end-of-text token."""
        for name in ("pad_token_id", "eos_token_id"):
            if getattr(self.tokenizer, name, None) is not None:
                return int(getattr(self.tokenizer, name))
        raise HAMUValueError("Expected `tokenizer` to have a padding token, but it has none. Set tokenizer.pad_token.")

    @property
    def _has_chat(self) -> bool:
        return getattr(self.tokenizer, "chat_template", None) is not None

    def _split(self, record: QARecord, answer: str) -> tuple[list[int], _Written]:
        """The tokens of the prompt, and those of the answer with what ends it."""
        if record.question is not None and self._has_chat:
            prompt, whole = self._chat(record.question), self._chat(record.question, answer)
            if not whole.startswith(prompt):
                raise HAMUValueError(
                    "Expected the chat template to write the answer after the prompt, but it writes the prompt "
                    "otherwise then. Set tokenizer.chat_template = None, and give `template`."
                )
            return self._tokenize_pair(prompt, whole[len(prompt) :], special=False)
        prompt = "" if record.question is None else self.template.replace("{question}", record.question)
        first, second = self._tokenize_pair(prompt, f" {answer}" if prompt else answer, special=True)
        end = self.tokenizer.eos_token_id
        return first, second.ended_by(end)

    def _mark(self, written: _Written, spans: Sequence[str]) -> list[int]:
        text, places = written.text, written.places
        if spans and places is None:
            text, places = places_by_decoding(self.tokenizer, written.ids)
        return mark_tokens(text, places, spans) if places else [0] * len(written.ids)

    def _tokenize_pair(self, prompt: str, answer: str, special: bool) -> tuple[list[int], _Written]:
        if not getattr(self.tokenizer, "is_fast", False):
            first_ids = self._begin(prompt) if special else self._tokenize(prompt)
            return first_ids, _Written(self._tokenize(answer), prompt + answer)
        encoded = self.tokenizer(prompt + answer, add_special_tokens=special, return_offsets_mapping=True)
        ids = self._without_end(encoded["input_ids"]) if special else list(encoded["input_ids"])
        places = [(int(start), int(end)) for start, end in encoded["offset_mapping"][: len(ids)]]
        # Special tokens that are put before a text end at 0.
        first = next((i for i, (_, end) in enumerate(places) if end > len(prompt)), len(ids))
        # A span in the prompt is none of the answer's.
        text = " " * len(prompt) + answer
        return ids[:first], _Written(ids[first:], text, places[first:])

    def _chat(self, question: str, answer: str | None = None) -> str:
        turns = [{"role": "user", "content": question}]
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None))

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _begin(self, text: str) -> list[int]:
        """Tokens with what the tokenizer puts before a text; what it puts behind comes after the answer."""
        return self._without_end(self.tokenizer(text)["input_ids"])

    def _without_end(self, ids: Sequence[int]) -> list[int]:
        return list(ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids)


@dataclass(frozen=True)
class PadCollator:
    """Fills the samples of a batch up to the longest one.

    Args:
        pad_id: The token that fills up; it is masked, and has no label.
        left: Fill up at the beginning, as generation needs it.

    Example:
        >>> batch = PadCollator(0)([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}])
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
        ([[5, 6], [7, 0]], [[1, 1], [1, 0]], [[-100, 6], [7, -100]])
    """

    pad_id: int
    left: bool = False

    def __call__(self, samples: Sequence[Encoded | Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask`, `labels` and, where there are, `core_tokens`, int64 `[N, T]`."""
        ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": self._fill(ids, self.pad_id),
            "attention_mask": self._fill([[1] * len(x) for x in ids], 0),
            "labels": self._fill([sample["labels"] for sample in samples], _IGNORED),
        }
        if any(CORE in sample for sample in samples):
            marks = [sample.get(CORE, [0] * len(sample["input_ids"])) for sample in samples]
            batch[CORE] = self._fill(marks, 0)  # type: ignore[arg-type]
        return batch

    def _fill(self, rows: list[list[int]], value: int) -> Tensor:
        longest = max(map(len, rows))
        gaps = [[value] * (longest - len(row)) for row in rows]
        return torch.tensor([gap + row if self.left else row + gap for row, gap in zip(rows, gaps, strict=True)])
