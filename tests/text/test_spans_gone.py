"""Target reached is never said while a given span is generated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from hamu_lightning import HAMUCallback
from hamu_lightning.callbacks import StopReason
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.text import CausalLMModule, QAData, QARecord, SpansGone, TextSettings, evaluate_text
from tests.text.world import make_trained_model


@pytest.fixture(scope="module")
def module(tokenizer: Any) -> CausalLMModule:
    return CausalLMModule(make_trained_model(tokenizer, steps=80), lr=1e-2)


def test_what_comes_out_is_counted(module: CausalLMModule, data: QAData) -> None:
    rows = evaluate_text(module, {"forget": data.forget}, settings=TextSettings(max_new_tokens=12)).parts["forget"].rows
    n = sum(bool(row.spans) for row in rows)
    assert n == len(data.forget) == 2  # it has learnt them by heart
    assert SpansGone(data.forget, max_new_tokens=12)(module) == (
        "the greedy answers to 2 of 2 records hold a given span (allowed: 0)"
    )
    assert SpansGone(data.forget, allowed=2, max_new_tokens=12)(module) == ""
    asked = SpansGone(data.forget, most=1, max_new_tokens=12)(module)
    assert asked.startswith("the greedy answers to 1 of 1 of 2 records that were asked")


def test_samples_are_held_against_a_reference(module: CausalLMModule, data: QAData) -> None:
    settings = TextSettings(max_new_tokens=12, samples=4)
    same = evaluate_text(module, {"forget": data.forget}, settings=settings)
    options: dict[str, Any] = {"samples": 4, "allowed": 2, "max_new_tokens": 12}
    state = torch.get_rng_state()
    assert "of 2 of 2 records one of 4 sampled answers does (allowed: 10 %)" in SpansGone(data.forget, **options)(
        module
    )
    assert SpansGone(data.forget, reference=same, **options)(module) == ""
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(HAMUValueError, match="Expected a reference that was asked with at least 8 samples"):
        SpansGone(data.forget, samples=8, reference=same)


def test_records_without_spans_are_refused(data: QAData) -> None:
    plain = [type(r)(question=r.question, answer=r.answer) for r in data.forget.records]
    with pytest.raises(HAMUValueError, match="Expected records with a question and `spans`"):
        SpansGone(plain, data.forget.encoder.tokenizer)


@pytest.mark.filterwarnings("ignore:The fit has ended before the target")
def test_the_target_is_not_reached_while_a_span_comes_out(module: CausalLMModule, data: QAData) -> None:
    """The mean comes to a low target long before the spans go; with the check the fit goes on until they have."""
    confirm = SpansGone(data.forget, max_new_tokens=12)
    ends = []
    for check in (None, confirm):
        copy = CausalLMModule(make_trained_model(data.forget.encoder.tokenizer, steps=80), lr=1e-2)
        hamu = HAMUCallback(target=0.4, confirm=check)
        trainer = Trainer(
            max_steps=60,
            accelerator="cpu",
            logger=False,
            callbacks=[hamu],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(copy, datamodule=data)
        ends.append((hamu.stop_reason, confirm(copy), hamu.summary))
    (plain, left, _), (reason, gone, summary) = ends
    assert plain is StopReason.TARGET_REACHED and left
    assert (reason is StopReason.TARGET_REACHED) == (gone == "")
    assert gone == "" or f"Not gone: {gone}" in summary


def test_one_text_is_one_span_and_blanks_are_none() -> None:
    """A text would be taken letter by letter, and found nowhere; a blank would be found in each answer."""
    assert QARecord("Where?", "In Rome", spans="Rome").spans == ("Rome",)  # type: ignore[arg-type]
    assert QARecord("Where?", "In Rome", spans=("", " ", "Rome")).spans == ("Rome",)
