"""The layouts in which published sets hold questions and answers, brought into one form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hamu_lightning.checks import store
from hamu_lightning.errors import HAMUValueError


@dataclass(frozen=True)
class QARecord:
    """A question and what may be said to it, or a plain text.

    Attributes:
        question: What is asked; None for a plain text, which has no prompt.
        answer: The right answer, or the text.
        paraphrased: The right answer in other words; None where there is none.
        perturbed: Wrong answers.
        spans: The words that must not come out any more, such as a name or a year; one text is one span, and blank
            ones, which every answer holds, are left out.
    """

    question: str | None
    answer: str
    paraphrased: str | None = None
    perturbed: tuple[str, ...] = ()
    spans: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Bring the spans into one form."""
        spans = (self.spans,) if isinstance(self.spans, str) else self.spans
        store(self, spans=tuple(span for span in spans if span.strip()))


def parse_record(row: Mapping[str, Any]) -> QARecord:
    """Bring the columns of a record into one form; which layout it is, the columns say.

    - TOFU, WaterDrum-TOFU, MUSE `knowmem`: `question`, `answer`, and where they are there `paraphrased_answer` and
      `perturbed_answer` (a list, or one text).
    - WMDP: `question`, `choices`, and `answer` as the number of the right choice; the others are wrong answers.
    - MUSE `verbmem`: `prompt`, `gt`.
    - MUSE and WaterDrum-Ax texts, plain text: `text`.

    In each of them `spans`, a text or a list, may say what must not come out any more. Other columns are left alone.

    Names of columns were looked up in the sets' own pages or in programs that read them: TOFU, WaterDrum-TOFU, WMDP,
    MUSE `text` and `knowmem`. Those of MUSE `verbmem` could not be confirmed.

    Args:
        row: The columns.

    Returns:
        The record.

    Raises:
        HAMUValueError: If the columns fit no layout, or hold something else; without what they hold.

    Example:
        >>> parse_record({"question": "Which is even?", "choices": ["1", "2"], "answer": 1})
        QARecord(question='Which is even?', answer='2', paraphrased=None, perturbed=('1',), spans=())
    """
    spans = _texts(row, "spans")
    if "choices" in row:
        return _parse_choices(row, spans)
    if "question" in row or "answer" in row:
        paraphrased = None if row.get("paraphrased_answer") is None else _text(row, "paraphrased_answer")
        wrong = _texts(row, "perturbed_answer")
        return QARecord(_text(row, "question"), _text(row, "answer"), paraphrased, wrong, spans)
    if "prompt" in row or "gt" in row:
        return QARecord(_text(row, "prompt"), _text(row, "gt"), spans=spans)
    if "text" in row:
        return QARecord(None, _text(row, "text"), spans=spans)
    raise HAMUValueError("it has none of the columns `question`, `choices`, `prompt` and `text`")


def _parse_choices(row: Mapping[str, Any], spans: tuple[str, ...]) -> QARecord:
    choices, right = _texts(row, "choices"), row.get("answer")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
        raise HAMUValueError("`answer` is not the number of one of its `choices`, which count from 0")
    wrong = tuple(choice for i, choice in enumerate(choices) if i != right)
    return QARecord(_text(row, "question"), choices[right], perturbed=wrong, spans=spans)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        raise HAMUValueError(f"`{name}` is missing")
    if not isinstance(value, str):
        raise HAMUValueError(f"`{name}` is no text")
    if not value.strip():
        raise HAMUValueError(f"`{name}` is empty")
    return value


def _texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of texts, or one; none where the column is missing."""
    value = row.get(name)
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) and text.strip() for text in value):
        raise HAMUValueError(f"`{name}` is no list of texts that are not empty")
    return tuple(value)
