"""QAData: layouts, masks, parts, and the error of each malformed record."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.text import Encoder, PadCollator, QAData, QARecord, Records, TextDataset, parse_record
from tests.text.world import CHAT, make_rows, make_tokenizer, write_lines

QA = {"question": "Who ?", "answer": "Ann"}
# For each malformed line what is said of it.
MALFORMED = {
    "it is no JSON": '{"question": "SECRET"',
    "it is no JSON object": '["SECRET"]',
    "it has none of the columns `question`, `choices`, `prompt` and `text`": '{"SECRET": "SECRET"}',
    "`question` is missing": '{"answer": "SECRET"}',
    "`answer` is missing": '{"question": "SECRET"}',
    "`answer` is no text": '{"question": "SECRET", "answer": 3}',
    "`answer` is empty": '{"question": "SECRET", "answer": " "}',
    "`paraphrased_answer` is no text": '{"question": "SECRET", "answer": "SECRET", "paraphrased_answer": [1]}',
    "`perturbed_answer` is no list of texts that are not empty": '{"answer": "S", "perturbed_answer": 3}',
    "`choices` is no list of texts that are not empty": '{"question": "SECRET", "choices": 3, "answer": 0}',
    "`answer` is not the number of one of its `choices`, which count from 0": '{"choices": ["SECRET"], "answer": 1}',
    "`gt` is missing": '{"prompt": "SECRET"}',
    "`text` is no text": '{"text": ["SECRET"]}',
    "`spans` is no list of texts that are not empty": '{"text": "SECRET", "spans": {"a": 1}}',
    "it is not in UTF-8": b'{"text": "\xff"}',
}


@pytest.mark.parametrize(("fault", "line"), MALFORMED.items(), ids=list(MALFORMED))
def test_a_malformed_record_is_told_by_its_line(tmp_path: Path, fault: str, line: str | bytes) -> None:
    bad = line if isinstance(line, bytes) else line.encode()
    file = tmp_path / "facts.jsonl"
    file.write_bytes(json.dumps(QA).encode() + b"\n\n" + bad + b"\n" + json.dumps(QA).encode())
    with pytest.raises(HAMUValueError) as raised:
        Records(file)
    assert f"1 cannot be read: facts.jsonl, line 3: {fault}. Mend" in str(raised.value)
    assert "SECRET" not in str(raised.value)


def test_many_faults_are_counted(tmp_path: Path) -> None:
    with pytest.raises(HAMUValueError, match="12 cannot be read: .*line 10: it is no JSON; and 2 more"):
        Records(write_lines(tmp_path / "a.jsonl", ["{"] * 12))


def test_a_malformed_row_of_parquet(tmp_path: Path) -> None:
    table = pa.table({"question": ["Who ?", None], "answer": ["Ann", "SECRET"]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(HAMUValueError, match="a.parquet, row 2: `question` is missing"):
        Records(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("row", "record"),
    [
        (QA, QARecord("Who ?", "Ann")),
        (
            {**QA, "paraphrased_answer": "It is Ann", "perturbed_answer": ["Bo", "Cy"]},
            QARecord("Who ?", "Ann", "It is Ann", ("Bo", "Cy")),
        ),
        ({**QA, "perturbed_answer": "Bo", "spans": "Ann"}, QARecord("Who ?", "Ann", None, ("Bo",), ("Ann",))),
        ({"question": "?", "choices": ["a", "b", "c"], "answer": 1}, QARecord("?", "b", None, ("a", "c"))),
        ({"prompt": "Once", "gt": "upon a time", "other": 1}, QARecord("Once", "upon a time")),
        ({"text": "Once upon"}, QARecord(None, "Once upon")),
    ],
    ids=["qa", "tofu", "one wrong answer", "wmdp", "muse verbmem", "text"],
)
def test_layouts(row: dict[str, Any], record: QARecord) -> None:
    assert parse_record(row) == record


def test_records_of_several_files_are_numbered_through(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(6)]
    write_lines(tmp_path / "a.jsonl", [{"text": texts[0]}, "", {"text": texts[1]}])
    pq.write_table(pa.table({"text": texts[2:5]}), tmp_path / "b.parquet", row_group_size=2)
    (tmp_path / "c.txt").write_text(f"\n{texts[5]}")
    (tmp_path / "d.csv").write_text("not read")
    records = Records(tmp_path)
    assert [record.answer for record in records] == texts
    assert records[-1].answer == texts[5] and [r.answer for r in records[1:3]] == texts[1:3]
    assert [pickle.loads(pickle.dumps(records))[i].answer for i in (5, 0)] == [texts[5], texts[0]]
    with pytest.raises(IndexError):
        records[6]


def test_files_stay_on_the_disk(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "long.jsonl", [{"text": "word " * 2000}] * 50)
    assert len(pickle.dumps(Records(file))) < file.stat().st_size / 100


def test_empty_files(tmp_path: Path) -> None:
    with pytest.raises(HAMUValueError, match="at least one record"):
        Records(write_lines(tmp_path / "a.jsonl", ["", " "]))


def test_nothing_is_downloaded(tmp_path: Path) -> None:
    for files in ("locuslab/TOFU", tmp_path, tmp_path / "a.csv"):
        with pytest.raises(HAMUValueError, match="Nothing is downloaded"):
            Records(files)
    with pytest.raises(HAMUValueError, match="a folder or files"):
        Records(3)  # type: ignore[arg-type]


def test_the_prompt_is_masked(tokenizer: Any) -> None:
    sample = Encoder(tokenizer).encode(QARecord("Where was Ada Lor born ?", "In Karla ."))
    words = tokenizer.convert_ids_to_tokens(sample["input_ids"])
    assert words == "Question: Where was Ada Lor born ? Answer: In Karla . </s>".split()
    assert sample["labels"] == [-100] * 8 + sample["input_ids"][8:]


def test_a_text_has_labels_from_its_beginning_on(tokenizer: Any) -> None:
    sample = Encoder(tokenizer).encode(QARecord(None, "Ada Lor was born"))
    assert sample["labels"] == sample["input_ids"] and sample["input_ids"][-1] == tokenizer.eos_token_id


def test_a_tokenizer_that_begins_each_text_with_a_blank() -> None:
    """As Llama 2's: an answer that is tokenized by itself would begin with two."""
    words = Tokenizer(models.WordLevel({"?": 0, "▁Q:": 1, "▁Who": 2, "▁A:": 3, "▁Ann": 4, "</s>": 5}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    encoder = Encoder(tokenizer, template="Q: {question} A:")
    assert encoder.encode(QARecord("Who", "Ann")) == {
        "input_ids": [1, 2, 3, 4, 5],
        "labels": [-100, -100, -100, 4, 5],
    }


class Slow:
    """A tokenizer that does not tell where its tokens stand."""

    eos_token_id, pad_token_id, chat_template, is_fast = 2, 0, None, False

    def __init__(self, fast: Any) -> None:
        self.fast = fast

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return {"input_ids": [*([1] if add_special_tokens else []), *self.fast(text)["input_ids"]]}


def test_slow_tokenizers(tokenizer: Any) -> None:
    record = QARecord("Where was Ada Lor born ?", "In Karla .")
    fast, slow = (Encoder(which).encode(record) for which in (tokenizer, Slow(tokenizer)))
    assert slow == {"input_ids": [1, *fast["input_ids"]], "labels": [-100, *fast["labels"]]}


def test_chat_templates() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    encoder, record = Encoder(tokenizer), QARecord("Where was Ada Lor born ?", "In Karla .")
    sample = encoder.encode(record)
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": record.question}, {"role": "assistant", "content": record.answer}], tokenize=False
    )
    assert sample["input_ids"] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    answer = tokenizer("In Karla . </s>", add_special_tokens=False)["input_ids"]
    assert [label for label in sample["labels"] if label != -100] == answer
    assert encoder.prompt(record) + answer == sample["input_ids"]
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(HAMUValueError, match="writes the prompt otherwise"):
        Encoder(tokenizer).encode(record)


def test_long_samples_lose_the_end_of_their_answer(tokenizer: Any) -> None:
    record = QARecord("Where was Ada Lor born ?", "In Karla .")
    whole = Encoder(tokenizer).encode(record)["input_ids"]
    assert Encoder(tokenizer, max_length=9).encode(record)["input_ids"] == whole[:9]
    with pytest.raises(HAMUValueError, match="a prompt of 8 and an answer of 4. Raise `max_length`"):
        Encoder(tokenizer, max_length=8).encode(record)
    with pytest.raises(HAMUValueError, match="Write {question} into it"):
        Encoder(tokenizer, template="Answer:")
    with pytest.raises(HAMUValueError, match="AutoTokenizer"):
        Encoder(None)


def test_batches_are_padded_to_their_longest() -> None:
    samples = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = PadCollator(9, left=True)(samples)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, 4]]
    assert PadCollator(9)(samples)["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]


@pytest.mark.parametrize("forget", [[1, 0], "forgotten"], ids=["numbers", "column"])
def test_parts(facts: Path, tokenizer: Any, forget: Any) -> None:
    data = QAData(facts, tokenizer, forget=forget, holdout=[6, 7], batch_size=3, forget_batch_size=2)
    assert [list(part.ids) for part in (data.retain, data.forget, data.holdout)] == [[2, 3, 4, 5], [0, 1], [6, 7]]
    assert [len(batch["labels"]) for batch in data.train_dataloader()] == [3, 1]
    assert [len(batch["labels"]) for batch in data.forget_dataloader()] == [2]
    assert [len(batch["labels"]) for batch in data.val_dataloader()] == [2]


def test_paraphrased_and_perturbed_answers(data: QAData, tokenizer: Any) -> None:
    rows = make_rows()
    paraphrased, perturbed = data.forget.with_answers("paraphrased"), data.forget.with_answers("perturbed")
    assert (list(paraphrased.ids), list(perturbed.ids)) == ([0, 1], [0, 0, 0, 1, 1, 1])
    for dataset, index, answer in (
        (paraphrased, 1, rows[1]["paraphrased_answer"]),
        (perturbed, 4, rows[1]["perturbed_answer"][1]),
    ):
        labels = [label for label in dataset[index]["labels"] if label != -100]
        assert labels == tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    plain = TextDataset([QARecord("Who ?", "Ann")], tokenizer)
    assert len(plain.with_answers("paraphrased")) == len(plain.with_answers("perturbed")) == 0


def test_parts_from_files_of_their_own(tmp_path: Path, facts: Path, tokenizer: Any) -> None:
    forget = write_lines(tmp_path / "forget.jsonl", make_rows()[:3])
    data = QAData(str(facts), tokenizer, forget=forget, holdout=[forget])
    assert (len(data.retain), len(data.forget), len(data.holdout)) == (8, 3, 3)


def test_workers_read_the_same(data: QAData, facts: Path, tokenizer: Any) -> None:
    other = QAData(facts, tokenizer, forget="forgotten", holdout="unseen", batch_size=2, num_workers=1)
    for ours, theirs in zip(data.val_dataloader(), other.val_dataloader(), strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_what_is_refused(facts: Path, tokenizer: Any) -> None:
    with pytest.raises(HAMUValueError, match="no record in both `forget` and `holdout`, but got 1"):
        QAData(facts, tokenizer, forget=[1], holdout=[1, 2])
    with pytest.raises(HAMUValueError, match="facts.jsonl, line 1: the column 'absent' is not true or false"):
        QAData(facts, tokenizer, forget="absent")
    with pytest.raises(HAMUValueError, match="facts.jsonl, line 8: the column 'question' is not true or false"):
        QAData(facts, tokenizer, forget="question")
    with pytest.raises(HAMUValueError, match="a record's number` to be at most 7, but got 8"):
        QAData(facts, tokenizer, forget=[8])
    with pytest.raises(HAMUValueError, match="each number in `forget` once"):
        QAData(facts, tokenizer, forget=[1, 1])
    plain = QAData(facts, tokenizer)
    assert plain.val_dataloader() == []
    with pytest.raises(HAMUStateError, match="Give QAData `forget`"):
        plain.forget_dataloader()
