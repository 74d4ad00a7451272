"""The record: what its hashes are of, that it is JSON of its schema, and what it must not hold."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from torch import nn

from hamu_lightning.callbacks import ForgottenSamples
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.evidence import (
    AttackRow,
    Finding,
    compare_weights,
    hash_weights,
    load_schema,
    make_record,
    model_card,
    read_record,
    write_report,
)
from hamu_lightning.metrics.functional import Estimate, undefined
from tests.evidence.made_up import INSIDE, answer, make_logits, make_retrained, without_class

EVIL = "<script>alert(1)</script>"


def check(record: dict[str, Any]) -> None:
    """Raise unless a record is strict JSON of its schema."""
    text = json.dumps(record, allow_nan=False)
    jsonschema.Draft202012Validator(load_schema()).validate(json.loads(text))


def make_table(n: int = 30) -> ForgottenSamples:
    after = torch.linspace(3, 0.1, n)
    return ForgottenSamples.of(torch.arange(n), torch.full((n,), 0.5), after, torch.ones(n))


def full_record(**more: Any) -> dict[str, Any]:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    return make_record(
        requests={EVIL: range(30)},
        before=answer(make_logits(0)),
        after=answer(without_class(7)),
        references=make_retrained(),
        attacks=[INSIDE, AttackRow(EVIL, undefined("no class was forgotten"), None, EVIL)],
        audit=[Finding(EVIL, "yes", EVIL), Finding("cache", "no", "")],
        weights_before=model,
        weights_after=other,
        samples={EVIL: make_table()},
        seeds={"data": 3},
        configuration={"rule": nn.Identity(), "lr": 0.1, "nothing": None, "function": [make_table]},
        run={"combined_steps": 12, "summary": EVIL, "stop_message": None, "level": math.nan},
        **more,
    )


def test_records_fit_their_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(load_schema())
    check(make_record(requests={}))
    record = full_record()
    check(record)
    assert record["metrics"]["floor"]["js"]["value"] > 0
    assert record["attacks"][-1]["name"] == "unchanged"
    expected = {"rule": "Identity()", "lr": 0.1, "nothing": None, "function": "[<function make_table>]"}
    assert record["configuration"] == expected
    assert record["run"]["level"] is None


@pytest.mark.parametrize(
    ("path", "value"),
    [(("verdict", "kind"), "fine"), (("requests", 0, "n"), -1), (("metrics", "after", "FA", "value"), None)],
)
def test_the_schema_refuses(path: tuple[Any, ...], value: Any) -> None:
    record = full_record()
    inner: Any = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(record)


def test_a_number_that_is_none_is_null_with_its_reason() -> None:
    rows = [
        AttackRow("a", undefined("no sample"), Estimate(math.inf, (0.5, math.inf), (3,)), ""),
    ]
    record = make_record(requests={}, attacks=rows)
    check(record)
    assert record["attacks"][0]["value"]["value"] is None
    assert record["attacks"][0]["value"]["reason"] == "no sample"
    assert record["attacks"][0]["control"] == {
        "value": None,
        "interval": [0.5, None],
        "n": [3],
        "ideal": None,
        "bound": None,
        "reason": "it is infinite",
    }


def test_ids_are_hashed_under_a_salt_of_their_own() -> None:
    first, second = (make_record(requests={"r": ["Jane Doe", 4]}) for _ in range(2))
    salt = bytes.fromhex(first["salt"])
    expected = sorted(hmac.new(salt, name, hashlib.sha256).hexdigest() for name in (b"Jane Doe", b"4"))
    assert first["requests"][0]["sample_hashes"] == expected
    assert not {*expected} & {*second["requests"][0]["sample_hashes"]}
    assert "Jane" not in json.dumps(first)


def test_hashes_are_of_the_numbers_alone() -> None:
    """By numpy: type, shape, and the elements in row-major order."""
    weights = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(1, dtype=torch.int64)}
    head = b"float32 [2, 3]\0"
    found = hash_weights(weights)
    assert found["b"] == hashlib.sha256(head + np.arange(6, dtype="<f4").tobytes()).hexdigest()
    assert found["a"] == hashlib.sha256(b"int64 []\0" + (1).to_bytes(8, "little")).hexdigest()
    # The order of names, the layout in memory, a gradient, a file, and what is no tensor make no difference.
    file = io.BytesIO()
    torch.save({"a": weights["a"], "b": nn.Parameter(weights["b"].T.contiguous().T), "epoch": 3}, file)
    file.seek(0)
    assert hash_weights(torch.load(file, weights_only=True)) == found
    for other in (
        weights["b"].double(),
        weights["b"].reshape(3, 2),
        weights["b"].T,
        weights["b"] + 1e-6,
        torch.ones(0),
    ):
        assert hash_weights({"b": other})["b"] != found["b"]
    assert hash_weights({"h": torch.ones(2, dtype=torch.bfloat16)}) != hash_weights({"h": torch.ones(2).half()})
    with pytest.raises(HAMUValueError, match="Expected `weights` to be a module or a state dict"):
        hash_weights([1])  # type: ignore[arg-type]


def test_unchanged_counts_weights_of_whole_tensors() -> None:
    before = {"a": torch.zeros(6), "b": torch.zeros(2), "steps": torch.tensor(3)}
    after = {"a": torch.zeros(6), "b": torch.tensor([0.0, 1.0]), "steps": torch.tensor(3)}
    assert compare_weights(before, after).value.value == 6 / 8
    assert compare_weights({}, {}).value.reason == "there are no weights"


def test_extremes_are_the_first_and_the_last_by_loss() -> None:
    samples = full_record()["samples"][EVIL]
    assert samples["n"] == 30
    assert [row["loss_after"] for row in samples["remembered"]] == sorted(make_table().loss_after.tolist())[:10]
    assert samples["over_forgotten"][0]["loss_after"] == 3.0


def test_read_what_was_written(tmp_path: Path) -> None:
    record = full_record()
    write_report(tmp_path / "new", record)
    assert read_record(tmp_path / "new" / "hamu_record.json") == record
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"hamu_record.json", "report.html", "model_card.md"}
    for name, text in (("a", "[1]"), ("b", "{}"), ("c", "{"), ("d", json.dumps({**record, "format": "other"}))):
        (tmp_path / name).write_text(text)
        with pytest.raises(HAMUStateError, match="to be a record"):
            read_record(tmp_path / name)


def test_the_model_card_has_the_hubs_layout() -> None:
    import yaml

    card = model_card(full_record())
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "lightning",
        "tags": ["machine-unlearning", "hamu-lightning"],
        "metrics": ["accuracy"],
    }
    assert body.lstrip().startswith("## Unlearning")
    assert "<script>" not in card and r"\<script\>" in card
    assert "| Forgotten samples that the model still recognises | 100 % | 0 % | 0 % |" in card
