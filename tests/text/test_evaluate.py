"""evaluate_text against loops by hand, and the callback."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from scipy.stats import ks_2samp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.callbacks import StepOptions
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.rules import RelativeRadius
from hamu_lightning.text import (
    CausalLMModule,
    EvaluateText,
    QAData,
    QARecord,
    TextEvaluation,
    TextSettings,
    contains_spans,
    evaluate_text,
    is_gibberish,
    rouge_l_recall,
)
from tests.distributed import run_ranks
from tests.text.world import make_model, make_rows, make_tokenizer, make_trained_model

SETTINGS = TextSettings(batch_size=3, max_new_tokens=6, samples=3, k=2)
ROWS = make_rows()
PARTS = {
    "forget": [0, 1],
    "retain": [2, 3, 4, 5],
    "holdout": [6, 7],
}


def make_records(ids: list[int]) -> list[QARecord]:
    return [
        QARecord(r["question"], r["answer"], r["paraphrased_answer"], tuple(r["perturbed_answer"]), (r["spans"],))
        for r in (ROWS[i] for i in ids)
    ]


def ask(seed: int = 0, settings: TextSettings = SETTINGS) -> TextEvaluation:
    tokenizer = make_tokenizer()
    module = make_trained_model(tokenizer, seed).train()  # with dropout
    return evaluate_text(module, {name: make_records(ids) for name, ids in PARTS.items()}, tokenizer, settings)


@pytest.fixture(scope="module")
def evaluation() -> TextEvaluation:
    return ask()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return make_trained_model(tokenizer).eval()


def log_probs(model: Any, tokenizer: Any, question: str, answer: str) -> tuple[list[float], list[bool]]:
    """For each token of an answer its log-probability, and whether it is the likeliest; one text at a time."""
    prompt = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
    target = tokenizer(answer)["input_ids"] + [2]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([prompt + target])).logits[0].double().log_softmax(dim=-1)
    rows = [scores[len(prompt) + i - 1] for i in range(len(target))]
    found = [float(row[t]) for row, t in zip(rows, target, strict=True)]
    return found, [int(row.argmax()) == t for row, t in zip(rows, target, strict=True)]


def greedy(model: Any, tokenizer: Any, question: str) -> str:
    ids = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
    written: list[int] = []
    for _ in range(SETTINGS.max_new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax())
        if token == 2:
            break
        written.append(token)
    return str(tokenizer.decode(written, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("part", PARTS)
def test_each_record_against_a_loop(model: Any, tokenizer: Any, evaluation: TextEvaluation, part: str) -> None:
    for row, i in zip(evaluation.parts[part].rows, PARTS[part], strict=True):
        fact = ROWS[i]
        of_answer, hits = log_probs(model, tokenizer, fact["question"], fact["answer"])
        n = len(of_answer)
        assert row.loss == pytest.approx(-sum(of_answer) / n, abs=1e-6)
        assert row.exact == sum(hits) / n
        first = next(k for k in range(n + 1) if all(hits[k:]))
        assert row.extraction == pytest.approx(1 - first / n)
        lowest = sorted(of_answer)[: max(1, math.floor(0.4 * n))]
        assert row.min_k == pytest.approx(sum(lowest) / len(lowest), abs=1e-6)
        right, *wrong = (
            np.mean(log_probs(model, tokenizer, fact["question"], text)[0])
            for text in (fact["paraphrased_answer"], *fact["perturbed_answer"])
        )
        assert row.truth_ratio == pytest.approx(np.mean(np.exp(wrong)) / np.exp(right), rel=1e-5)
        assert row.truth_ratio_geometric == pytest.approx(np.exp(np.mean(wrong) - right), rel=1e-5)
        p = math.exp(-row.loss)
        assert row.share_of_options == pytest.approx(p / (p + np.exp(wrong).sum()), rel=1e-5)
        answer = greedy(model, tokenizer, fact["question"])
        assert row.answer == answer
        assert row.spans == (fact["spans"] in answer.split())
        assert row.rouge == pytest.approx(rouge_l_recall(answer, fact["answer"]))
        assert (row.leaks is None) == (part != "forget")


def test_numbers_of_parts(evaluation: TextEvaluation) -> None:
    numbers, forget = evaluation.numbers(), evaluation.parts["forget"].rows
    assert numbers["forget/probability"].value == pytest.approx(np.mean([math.exp(-row.loss) for row in forget]))
    ratios = [row.truth_ratio or 0 for row in forget]
    assert numbers["forget/truth_ratio"].value == pytest.approx(np.mean([min(r, 1 / r) for r in ratios]))
    kept = [row.truth_ratio_geometric or 0 for row in evaluation.parts["retain"].rows]
    assert numbers["retain/truth_ratio_geometric"].value == pytest.approx(np.mean([max(0, 1 - r) for r in kept]))
    assert numbers["forget/gibberish"].n == (2,)
    leaks = [row.leaks for row in forget]
    # Of three samples, the mean over the three pairs of the worse one.
    worst = [np.mean([max(a, b), max(a, c), max(b, c)]) for a, b, c in leaks]  # type: ignore[misc]
    assert numbers["leak_at_k"].value == pytest.approx(np.mean(worst))
    higher = [a.min_k > b.min_k for a in forget for b in evaluation.parts["holdout"].rows]
    assert numbers["min_k_auc"].value == pytest.approx(np.mean(higher))
    assert numbers["priv_leak"].value == pytest.approx(100 * ((1 - np.mean(higher)) / 0.5 - 1))


def test_what_needs_a_reference(evaluation: TextEvaluation) -> None:
    other = ask(seed=1, settings=TextSettings(max_new_tokens=0))
    alone, beside = evaluation.numbers(), evaluation.numbers(other)
    for kind in ("truth_ratio", "truth_ratio_geometric"):
        name = "forget_quality" + kind.removeprefix("truth_ratio")
        assert math.isnan(alone[name].value) and alone[name].reason == "no retrained model was given"
        ours, theirs = (x.parts["forget"].column(kind).numpy() for x in (evaluation, other))
        assert beside[name].value == pytest.approx(ks_2samp(ours, theirs).pvalue)
        assert beside[name].n == (2, 2)
    auc = other.numbers()["min_k_auc"].value
    if auc < 1:
        expected = 100 * ((1 - alone["min_k_auc"].value) / (1 - auc) - 1)
        assert beside["priv_leak"].value == pytest.approx(expected)


def test_utility_is_the_harmonic_mean_over_what_is_kept(tokenizer: Any, model: Any) -> None:
    parts = {name: make_records(PARTS["retain"]) for name in ("retain", "world_facts")}
    found = evaluate_text(model, {**parts, "forget": make_records([0])}, tokenizer, SETTINGS)
    numbers, facts = found.numbers(), found.parts["world_facts"].column("share_of_options")
    scores = [numbers["retain/probability"].value, float(facts.mean())]
    scores += [numbers[f"{part}/{name}"].value for part in parts for name in ("rouge_l_recall", "truth_ratio")]
    expected = 0 if min(scores) == 0 else len(scores) / sum(1 / score for score in scores)
    assert numbers["model_utility"].value == pytest.approx(expected)


def test_what_is_missing_is_nan_with_its_reason(tokenizer: Any, model: Any) -> None:
    text = [QARecord(None, "Ada Lor was born in Karla .")]
    numbers = evaluate_text(model, {"forget": text}, tokenizer, SETTINGS).numbers()
    reasons = {name: number.reason for name, number in numbers.items() if not number.is_defined}
    assert reasons["forget/rouge_l_recall"] == "no answer was generated"
    assert reasons["forget/truth_ratio"] == "no record has wrong answers"
    assert reasons["min_k_auc"] == reasons["priv_leak"] == "no holdout record was given"
    assert reasons["leak_at_k"] == "no answer of the forget part was sampled"
    assert numbers["forget/exact_memorization"].is_defined


def test_evaluation_leaves_no_trace(data: QAData, module: CausalLMModule) -> None:
    next(iter(module.model.parameters())).grad = None
    list(module.modules())[3].eval()
    modes, weights = [m.training for m in module.modules()], copy.deepcopy(module.state_dict())
    random = torch.get_rng_state(), np.random.get_state()[1].copy()
    evaluate_text(module, {"forget": data.forget}, settings=SETTINGS)
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random[0])
    assert np.array_equal(np.random.get_state()[1], random[1])


def test_samples_come_from_the_seed(evaluation: TextEvaluation) -> None:
    assert ask().parts["forget"].rows == evaluation.parts["forget"].rows


def test_a_part_of_the_records(data: QAData, model: Any) -> None:
    found = evaluate_text(model, {"retain": data.retain}, settings=TextSettings(most=2, max_new_tokens=0))
    assert [row.id for row in found.parts["retain"].rows] == [2, 4]


def share(rank: int) -> list[Any]:
    return [ask(settings=TextSettings(batch_size=1, max_new_tokens=3)).parts[name].rows for name in PARTS]


@pytest.mark.slow  # two processes import transformers
def test_two_processes_give_the_numbers_of_one() -> None:
    alone = share(0)
    for rows in run_ranks(share):
        assert rows == alone


def test_the_callback_logs_before_during_and_after(tmp_path: Path, data: QAData, tokenizer: Any) -> None:
    module = CausalLMModule(make_model(len(tokenizer)), lr=1e-2)
    watch = EvaluateText(settings=TextSettings(max_new_tokens=4), every_n_steps=2, answers=1)
    rule = HAMUQ(quota=1e-2, radius=RelativeRadius(1e-2, floor=1.0))
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        devices=1,
        logger=TensorBoardLogger(tmp_path),
        callbacks=[watch, HAMUCallback(rule=rule, steps=StepOptions(exact=True))],
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=data)
    events = EventAccumulator(trainer.log_dir).Reload()
    assert [event.step for event in events.Scalars("eval/forget/loss")] == [0, 2, 3]
    assert events.Scalars("eval/forget/loss")[-1].value == pytest.approx(watch.numbers["forget/loss"].value, rel=1e-5)
    assert trainer.callback_metrics["eval/forget/loss"] == pytest.approx(watch.numbers["forget/loss"].value)
    assert math.isnan(trainer.callback_metrics["eval/forget_quality"])
    assert "eval/forget_quality" not in events.Tags()["scalars"]
    (text,) = events.Tensors("eval/answers/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert len(lines) == 3 and lines[2].startswith("| Where was")
    assert watch.before is not None and watch.before.parts["forget"].column("loss").mean() > 0


def test_the_best_checkpoint_by_a_number(tmp_path: Path, data: QAData, tokenizer: Any) -> None:
    watch = EvaluateText(settings=TextSettings(max_new_tokens=0), every_n_steps=1, answers=0)
    best = ModelCheckpoint(tmp_path, monitor="eval/forget/loss", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        callbacks=[best, watch],
        num_sanity_val_steps=0,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(CausalLMModule(make_model(len(tokenizer)), lr=1e-2), datamodule=data)
    scores = sorted(float(score) for score in best.best_k_models.values())
    assert len(set(scores)) == 2 and best.best_model_score == pytest.approx(scores[0])
    assert scores[0] == pytest.approx(watch.numbers["forget/loss"].value)  # of the last step


def test_a_fit_goes_on_as_without_the_callback(data: QAData, tokenizer: Any) -> None:
    found = []
    for callbacks in ([], [EvaluateText(settings=SETTINGS, every_n_steps=1)]):
        torch.manual_seed(0)
        module = CausalLMModule(make_model(len(tokenizer)), lr=1e-2)
        Trainer(
            max_steps=2,
            accelerator="cpu",
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, datamodule=data)
        found.append(list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_words_about_answers() -> None:
    assert contains_spans("It was ADA  lor.", ["Ada Lor"]) and not contains_spans("Adam Lora", ["Ada", "Lor"])
    assert not contains_spans("anything", [])
    assert is_gibberish("") and is_gibberish("a b a b a b") and not is_gibberish("yes")
    assert rouge_l_recall("", "In Karla") == 0
    assert rouge_l_recall("He was born in Karla", "born in Mopel") == pytest.approx(2 / 3)


def test_what_is_refused(data: QAData, tokenizer: Any) -> None:
    with pytest.raises(HAMUValueError, match="`tokenizer` for parts that are lists"):
        evaluate_text(torch.nn.Linear(2, 2), {"forget": make_records([0])})
    with pytest.raises(HAMUValueError, match="to have a `generate`"):
        evaluate_text(torch.nn.Linear(2, 2), {"forget": data.forget})
    with pytest.raises(HAMUValueError, match="asked about by themselves"):
        evaluate_text(torch.nn.Linear(2, 2), {"forget": data.forget.with_answers("perturbed")})
    with pytest.raises(HAMUValueError, match="`k` to be at most 2"):
        TextSettings(samples=2, k=3)
