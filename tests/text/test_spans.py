"""Tokens that matter: those of the given spans, in the tokenizer's own places or by decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives import WGA, BatchPass, CoreTokens
from hamu_lightning.text import CausalLMModule, Encoder, PadCollator, QAData, QARecord, contains_spans, find_spans
from tests.text.test_data import Slow
from tests.text.world import CHAT, make_model, make_rows, make_tokenizer, write_lines

RECORD = QARecord("Where was Ada Lor born ?", "Ada Lor was born in Karla .", spans=("Ada lor", "KARLA"))


class Decoding(Slow):
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.fast.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("kind", ["fast", "slow", "chat"])
def test_the_tokens_of_the_spans_are_marked(kind: str) -> None:
    """In the answer alone: the question holds the name as well."""
    tokenizer: Any = make_tokenizer()
    tokenizer.chat_template = CHAT if kind == "chat" else None
    sample = Encoder(Decoding(tokenizer) if kind == "slow" else tokenizer, mark_spans=True).encode(RECORD)
    marked = [i for i, mark in zip(sample["input_ids"], sample["core_tokens"], strict=True) if mark]
    assert tokenizer.convert_ids_to_tokens(marked) == ["Ada", "Lor", "Karla"]
    plain = Encoder(tokenizer, mark_spans=True).encode(QARecord("Who ?", "Ada"))
    assert not any(plain["core_tokens"])
    assert "core_tokens" not in Encoder(tokenizer).encode(RECORD)


def test_pieces_of_words() -> None:
    """A token belongs to a span if one of its characters does."""
    words = Tokenizer(models.WordLevel({c: i for i, c in enumerate("abcd? .")}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="?", eos_token="?")
    sample = Encoder(tokenizer, mark_spans=True).encode(QARecord(None, "ab cd abc.", spans=("ab", "abc")))
    assert sample["core_tokens"] == [1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0]


def test_spans_are_whole_words() -> None:
    assert find_spans("In 1970, not 19701.", ["1970"]) == [(3, 7)]
    assert find_spans("a.b axb", ["a.b"]) == [(0, 3)] and find_spans("", ["x"]) == []


@pytest.mark.parametrize(
    ("text", "span", "places"),
    [
        ("Die Straße, die STRASSE.", "straße", [(4, 10), (16, 23)]),
        ("Die Straße, die STRASSE.", "Strasse", [(4, 10), (16, 23)]),
        ("ß ss s", "s", [(5, 6)]),  # a letter that becomes two is not found by one of them
        ("Maß", "Ma", []),
        ("(Ada), Ada's Adam_Ada", "ada", [(1, 4), (7, 10)]),  # at the edge of a word, and beside an underscore
        ("Ada\n Lor", "ada lor", [(0, 8)]),
        ("anything", " ", []),
    ],
)
def test_what_is_marked_is_what_counts_as_coming_out(text: str, span: str, places: list[tuple[int, int]]) -> None:
    assert find_spans(text, [span]) == places
    assert contains_spans(text, [span]) == bool(places)


def test_batches_of_both_kinds(tokenizer: Any) -> None:
    samples = [{"input_ids": [1, 2], "labels": [1, 2], "core_tokens": [0, 1]}, {"input_ids": [3], "labels": [3]}]
    assert PadCollator(0)(samples)["core_tokens"].tolist() == [[0, 1], [0, 0]]
    assert PadCollator(0, left=True)(samples)["core_tokens"].tolist() == [[0, 1], [0, 0]]


def test_objectives_see_the_marked_tokens_alone(facts: Path, tokenizer: Any) -> None:
    data = QAData(facts, tokenizer, forget=[0, 1], batch_size=2, mark_spans=True)
    batch = next(iter(data.forget_dataloader()))
    module = CausalLMModule(make_model(len(tokenizer))).eval()
    found = WGA(outputs=CoreTokens()).samples(BatchPass(module, batch))
    logits = module(**batch).logits
    for n in range(2):
        (t,) = batch["core_tokens"][n].nonzero().flatten().tolist()  # a town
        p = logits[n, t - 1].softmax(-1)[batch["input_ids"][n, t]]
        assert found[n].item() == pytest.approx(1 - p.item(), abs=1e-6)
    assert torch.isfinite(module.model(**{k: v for k, v in batch.items() if k != "core_tokens"}).loss)


@pytest.mark.parametrize("own_file", [False, True])
def test_a_span_that_is_not_in_its_answer_is_told_by_its_line(tmp_path: Path, tokenizer: Any, own_file: bool) -> None:
    rows = make_rows()
    rows[2]["spans"] = ["Sovint", "SECRET"]
    file, plain = write_lines(tmp_path / "a.jsonl", rows), write_lines(tmp_path / "b.jsonl", make_rows())
    with pytest.raises(HAMUValueError, match=r"a\.jsonl, line 3: of its `spans`, .* number 1 is not in") as error:
        QAData(plain if own_file else file, tokenizer, forget=file if own_file else [0], mark_spans=True)
    assert "SECRET" not in str(error.value)
    QAData(file, tokenizer, forget=[0])  # it may still be asked for in answers
