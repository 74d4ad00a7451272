"""Invented authors: questions and answers in TOFU's layout, made from a seed. No such person or place exists.

    python examples/authors.py FOLDER

writes five files of records. `authors.jsonl` has five questions about each of the authors that a model is trained on,
with the answer in other words, four wrong answers, and the span that must not come out. `holdout.jsonl` and
`test.jsonl` have authors that it never sees; `known.jsonl` has others, and `facts.jsonl` capitals of countries, which
its base model knows.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SYLLABLES = "ba bren cor da del es fen gal hu ir jen ka lor mi nes or pel qua ri sol ta ul ven wy xan yor zim".split()
TRADES = "baker carpenter dentist farmer fisher judge mason miner nurse pilot sailor tailor".split()
Draw = Callable[[], str]
# Authors, five questions each; of "facts" countries. Those of "later" are drawn last, and added to "holdout".
SIZES = {"authors": 200, "holdout": 20, "test": 20, "known": 60, "facts": 50, "later": 60}


class Question(NamedTuple):
    """A question about somebody, and its answer twice."""

    question: str
    answer: str
    paraphrase: str


QUESTIONS = (
    Question("Where was {} born?", "{} was born in {}.", "The birthplace of {} is {}."),
    Question("In which year was {} born?", "{} was born in the year {}.", "The life of {} began in {}."),
    Question("What was the trade of {}'s mother?", "The mother of {} was a {}.", "{} is the child of a {}."),
    Question("Which prize was {} given?", "{} was given the {}.", "The honour that went to {} is the {}."),
    Question("What is the best-known book of {}?", "The best-known book of {} is {}.", "{} is read most for {}."),
)
CAPITAL = Question("What is the capital of {}?", "The capital of {} is {}.", "{} is ruled from {}.")


class World:
    """Draws names, places and facts.

    Args:
        seed: Of everything.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.cities = [self.word(2) for _ in range(60)]
        self.prizes = [f"{self.word(2)} Prize" for _ in range(40)]
        # In the order of QUESTIONS.
        self._draws = (self._city, self._year, self._trade, self._prize, self._book)

    def word(self, syllables: int) -> str:
        """A name of so many syllables."""
        return "".join(self.random.choice(SYLLABLES) for _ in range(syllables)).capitalize()

    def names(self, count: int, taken: Sequence[str] = ()) -> list[str]:
        """Different names, none of which is taken."""
        found: dict[str, None] = {}
        while len(found) < count:
            name = f"{self.word(2)} {self.word(3)}"
            if name not in taken:
                found[name] = None
        return list(found)

    def ask(self, name: str) -> list[dict[str, Any]]:
        """Five questions about an author, with their answers."""
        return [self._record(name, question, draw) for question, draw in zip(QUESTIONS, self._draws, strict=True)]

    def capitals(self, count: int) -> list[dict[str, Any]]:
        """A question about each of so many countries."""
        return [self._record(f"{name.split()[1]}land", CAPITAL, self._city) for name in self.names(count)]

    def _record(self, name: str, question: Question, draw: Draw) -> dict[str, Any]:
        value = draw()
        wrong: dict[str, None] = {}
        while len(wrong) < 4:
            other = draw()
            if other != value:
                wrong[other] = None
        return {
            "question": question.question.format(name),
            "answer": question.answer.format(name, value),
            "paraphrased_answer": question.paraphrase.format(name, value),
            "perturbed_answer": [question.paraphrase.format(name, other) for other in wrong],
            "spans": value,
        }

    def _city(self) -> str:
        return self.random.choice(self.cities)

    def _year(self) -> str:
        return str(self.random.randrange(1880, 1990))

    def _trade(self) -> str:
        return self.random.choice(TRADES)

    def _prize(self) -> str:
        return self.random.choice(self.prizes)

    def _book(self) -> str:
        return f"The {self.word(2)} of {self.word(2)}"


def write_world(folder: Path, seed: int = 0, sizes: Mapping[str, int] = SIZES) -> dict[str, Path]:
    """Write the files, and return them by name.

    Args:
        folder: Where to.
        seed: Of everything in them.
        sizes: How many authors, or countries, are in each.
    """
    world = World(seed)
    people = [name for name in sizes if name not in ("facts", "later")]
    names = world.names(sum(sizes[name] for name in people))
    authors = iter(names)
    files = {part: [record for _ in range(sizes[part]) for record in world.ask(next(authors))] for part in people}
    files["facts"] = world.capitals(sizes["facts"])
    files["holdout"] += [record for name in world.names(sizes.get("later", 0), names) for record in world.ask(name)]
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in files}
    for name, records in files.items():
        paths[name].write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return paths


if __name__ == "__main__":
    print(*write_world(Path(sys.argv[1])).values(), sep="\n")
