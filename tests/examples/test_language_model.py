"""The small language model of the examples: its data, and what is asked of it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

SIZES = {"authors": 4, "holdout": 1, "test": 1, "known": 2, "facts": 2, "later": 2}


PER_AUTHOR = 5


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_world_is_made_from_its_seed_and_says_nothing_twice(tmp_path: Path) -> None:
    from authors import write_world

    files = write_world(tmp_path / "a", sizes=SIZES)
    again, other = (write_world(tmp_path / name, seed, SIZES) for name, seed in (("b", 0), ("c", 1)))
    assert {name: len(read(file)) for name, file in files.items()} == {
        **{name: PER_AUTHOR * SIZES[name] for name in ("authors", "test", "known")},
        "facts": 2,
        "holdout": PER_AUTHOR * (SIZES["holdout"] + SIZES["later"]),
    }
    questions = [row["question"] for file in files.values() for row in read(file)]
    assert len({*questions}) == len(questions)
    for row in (row for file in files.values() for row in read(file)):
        assert row["spans"] in row["answer"] and row["spans"] in row["paraphrased_answer"]
        assert len({*row["perturbed_answer"], row["paraphrased_answer"]}) == 5
    texts = [[file.read_text() for file in made.values()] for made in (files, again, other)]
    assert texts[0] == texts[1] != texts[2]


def test_all_questions_about_an_author_are_forgotten_together() -> None:
    from language_model import draw_authors

    chosen = draw_authors(3)
    authors = [i // PER_AUTHOR for i in chosen]
    assert chosen == sorted(chosen) and all(authors.count(author) == PER_AUTHOR for author in authors)
    assert chosen != draw_authors(4)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval:UserWarning")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The fit has ended before the target:UserWarning")
@pytest.mark.filterwarnings("ignore:The forget loss is:UserWarning")  # after an epoch nothing is known by heart
def test_a_run_from_nothing_to_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps of everything: each model and each number is there, and a second call reads them from their files."""
    import language_model

    small = {"SIZES": SIZES, "FORGOTTEN": 1, "BASE_EPOCHS": 1, "EPOCHS": 1, "LESSONS": 1}
    few = language_model.TextSettings(most=2, max_new_tokens=2)
    for name, value in {**small, "GREEDY": few, "SETTINGS": replace(few, samples=1)}.items():
        monkeypatch.setattr(language_model, name, value)
    monkeypatch.setattr(sys, "argv", ["language_model.py", "--out", str(tmp_path), "--steps", "2", "--lora"])
    language_model.main()
    printed = capsys.readouterr().out
    table = printed[printed.index(" " * 18 + f"{language_model.NAMES[0]:>11}") :]
    assert [line.split("  ")[0] for line in table.splitlines()[1:5]] == [
        "retrained",
        "another retrained",
        "original",
        "HAMU",
    ]
    monkeypatch.setattr(language_model.Lab, "_measure", lambda *args: pytest.fail("measured again"))
    language_model.main()
    assert capsys.readouterr().out.strip() == table.strip()
