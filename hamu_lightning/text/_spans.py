"""Where given words stand in an answer, in characters and in tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def find_spans(text: str, spans: Sequence[str]) -> list[tuple[int, int]]:
    r"""Find given words in a text: as whole words, whatever the case (`str.casefold`) and the white space.

    Args:
        text: Where to look.
        spans: Texts, such as a name or a year.

    Returns:
        Begin and end of each place, in characters.

    Example:
        >>> find_spans("In new\nYork, not New Yorkshire", ["New York"])
        [(3, 11)]
        >>> find_spans("Er wohnt in der Talstraße 7", ["TALSTRASSE"])
        [(16, 25)]
    """
    # A letter may become two: the place in the text of each that is searched.
    folded = [(letter, place) for place, char in enumerate(text) for letter in char.casefold()]
    searched = "".join(letter for letter, _ in folded)
    words = [r"\s+".join(map(re.escape, span.casefold().split())) for span in spans]
    found = [match for word in words if word for match in re.finditer(rf"(?<!\w){word}(?!\w)", searched)]
    return [(folded[match.start()][1], folded[match.end() - 1][1] + 1) for match in found]


def mark_tokens(text: str, places: Sequence[tuple[int, int]], spans: Sequence[str]) -> list[int]:
    """Mark the tokens of given words.

    Args:
        text: What was tokenized.
        places: Begin and end of each token in it, in characters.
        spans: As for `find_spans`.

    Returns:
        1 for each token of which a character belongs to a span, else 0.

    Example:
        >>> mark_tokens("In New York", [(0, 2), (2, 6), (6, 11)], ["york"])
        [0, 0, 1]
    """
    found = find_spans(text, spans)
    return [int(any(begin < end and start < stop for begin, stop in found)) for start, end in places]


def places_by_decoding(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of some tokens, and where each of them stands in it, of a tokenizer that does not tell."""
    texts = [str(tokenizer.decode(list(ids[:i]), skip_special_tokens=True)) for i in range(len(ids) + 1)]
    ends = [len(text) for text in texts]
    return texts[-1], list(zip(ends, ends[1:], strict=False))
