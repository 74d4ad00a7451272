"""Each verdict, on answers that are made to deserve it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.evidence import AttackRow, Evaluation, PartScores, judge
from hamu_lightning.metrics.functional import Estimate
from tests.evidence.made_up import INSIDE, answer, labels_of, make_logits, make_retrained, without_class

ORIGINAL = answer(make_logits(0))
RETRAINED = make_retrained()


def shifted(by: float = 40.0) -> Evaluation:
    logits = make_logits(0)
    for values in logits.values():
        values[:, 3] -= by
    return answer(logits)


def edited(**edits: float) -> Evaluation:
    """A model that never saw the class, and of which some answers are wrong: shares by part."""
    logits = without_class(7)
    for name, share in edits.items():
        wrong = range(round(share * len(logits[name])))
        for i in wrong:
            logits[name][i, (int(labels_of(name)[i]) + 1) % 3] += 30
    return answer(logits)


def test_a_retrained_model_has_forgotten() -> None:
    verdict = judge(ORIGINAL, answer(without_class(7)), RETRAINED, [INSIDE])
    assert verdict.kind == "forgotten", verdict.reasons
    assert "certif" not in verdict.text.lower() and verdict.text.count(". ") == 1
    assert verdict.text.endswith("no proof.")


def test_the_original_has_not() -> None:
    verdict = judge(ORIGINAL, ORIGINAL, RETRAINED, [INSIDE])
    assert verdict.kind == "not_forgotten"
    assert verdict.reasons[0] == "It says of every sample to forget what it said before."
    # Another model that saw all is found by its answers.
    assert judge(ORIGINAL, answer(make_logits(1)), RETRAINED, [INSIDE]).kind == "not_forgotten"
    assert judge(ORIGINAL, answer(make_logits(1))).kind == "not_forgotten"


def test_a_mean_that_five_samples_meet_is_seen_through() -> None:
    """The mean loss is that of a retrained model, and 35 of 40 samples are surer than before."""
    logits = make_logits(0)
    logits["forget"][5:, 3] += 5
    logits["forget"][:5, 3] -= 200
    model = answer(logits)
    assert float(model.parts["forget"].losses.mean()) > float(RETRAINED[0].parts["forget"].losses.mean())
    for references in ([], RETRAINED):
        verdict = judge(ORIGINAL, model, references, [INSIDE])
        assert verdict.kind == "not_forgotten"
        assert verdict.reasons[0] == "88 % of the samples to forget are better known to it than before."


@pytest.mark.parametrize("by", [40.0, math.inf])
def test_a_shifted_output_is_a_mask(by: float) -> None:
    assert float(shifted(by).numbers()["FA"]) == 0
    for references in ([], RETRAINED):
        assert judge(ORIGINAL, shifted(by), references, [INSIDE]).kind == "masked"


def test_a_new_head_is_seen_by_the_weights_alone() -> None:
    model = answer(without_class(7))
    row = AttackRow("unchanged", Estimate(0.93), None, "")
    assert judge(ORIGINAL, model, RETRAINED, [row]).kind == "masked"
    assert judge(ORIGINAL, model, RETRAINED, [replace(row, value=Estimate(0.0))]).kind == "forgotten"
    verdict = judge(ORIGINAL, model, RETRAINED)
    assert verdict.kind == "cannot_tell" and "cannot be told without an attack on its inside" in verdict.text


def test_a_shift_that_brings_the_class_back_is_found_behind_other_answers() -> None:
    """The other answers have changed too, so it is no mere mask; the order of the samples is the old one."""
    logits, other = make_logits(0), make_logits(5)
    for name, values in logits.items():
        values[:, :3] = other[name][:, :3]
        values[:, 3] -= 30
    verdict = judge(ORIGINAL, answer(logits), RETRAINED, [INSIDE])
    assert verdict.kind == "suppressed" and "One number added" in verdict.text


def test_an_attack_beside_its_control() -> None:
    model = answer(without_class(7))
    found = AttackRow("relearn", Estimate(0.9, (0.8, 0.95)), Estimate(0.3, (0.2, 0.4)), "")
    assert judge(ORIGINAL, model, RETRAINED, [found]).kind == "suppressed"
    # Within chance; without a control; a loss, of which less means more.
    for row in (
        replace(found, value=Estimate(0.5, (0.35, 0.65))),
        replace(found, control=None),
        replace(found, name="relearn_loss"),
    ):
        assert judge(ORIGINAL, model, RETRAINED, [row, INSIDE]).kind == "forgotten"


def test_harm_is_told_with_its_numbers() -> None:
    verdict = judge(ORIGINAL, edited(test=0.2), RETRAINED, [INSIDE])
    assert verdict.kind == "harmed" and "accuracy on test data is" in verdict.text
    assert judge(ORIGINAL, edited(retain=0.2), RETRAINED, [INSIDE]).kind == "harmed"
    assert judge(ORIGINAL, edited(retain=0.01), RETRAINED, [INSIDE]).kind == "forgotten"


def test_too_much_forgetting_stands_out() -> None:
    logits = without_class(7)
    for values in logits.values():
        values[:, 3] -= 60
    assert judge(ORIGINAL, answer(logits), RETRAINED, [INSIDE]).kind == "over_forgotten"


def of_losses(seed: int, forget: float, holdout: float = 1.0) -> Evaluation:
    """A model that is no classifier."""
    random = torch.Generator().manual_seed(seed)
    parts = {}
    for name, mean in (("retain", 0.2), ("forget", forget), ("holdout", holdout)):
        losses = mean * torch.rand(200, generator=random, dtype=torch.float64) + 0.01
        parts[name] = PartScores(losses, torch.full((200,), 0.5, dtype=torch.float64), torch.arange(200))
    return Evaluation(parts)


def test_models_without_classes() -> None:
    before, retrained = of_losses(0, forget=0.2), [of_losses(seed, forget=1.0) for seed in (2, 3, 4)]
    assert judge(before, of_losses(1, forget=1.0), retrained, [INSIDE]).kind == "forgotten"
    assert judge(before, of_losses(1, forget=1.0), [], [INSIDE]).kind == "forgotten"
    assert judge(before, of_losses(1, forget=0.4), retrained, [INSIDE]).kind == "not_forgotten"
    assert judge(before, of_losses(1, forget=9.0), retrained, [INSIDE]).kind == "over_forgotten"
    # The original knows the samples no better than held-out ones: whatever comes, it says nothing.
    verdict = judge(of_losses(9, forget=1.0), of_losses(1, forget=1.0), retrained, [INSIDE])
    assert verdict.kind == "cannot_tell" and "no memory of the data in the original" in verdict.text


def test_what_is_missing_is_named() -> None:
    before, after = ORIGINAL, answer(without_class(7))
    reasons = " ".join(judge(before, after).reasons)
    assert "'probe'" in reasons and "'logit_shift'" in reasons
    partial = Evaluation(dict(after.parts), is_whole=False)
    assert "Only a part of the data was read" in judge(before, partial, RETRAINED, [INSIDE]).text
    first = torch.arange(10)

    def cut(model: Evaluation) -> Evaluation:
        return Evaluation({**model.parts, "forget": model.parts["forget"].select(first)})

    verdict = judge(cut(before), cut(after), [cut(one) for one in RETRAINED], [INSIDE])
    assert verdict.kind == "cannot_tell" and "Only 10 samples" in verdict.text
    alone = Evaluation({"forget": after.parts["forget"]})
    told = judge(Evaluation({"forget": before.parts["forget"]}), alone, RETRAINED, [INSIDE])
    assert "Nothing was measured of what was to be kept." in told.reasons


def test_other_samples_are_refused() -> None:
    other = Evaluation({"forget": ORIGINAL.parts["forget"].select(torch.arange(39))})
    for models in ((ORIGINAL, other), (other, ORIGINAL), (ORIGINAL, ORIGINAL, [other])):
        with pytest.raises(HAMUValueError, match="Expected every model to be evaluated on the same samples"):
            judge(*models)  # type: ignore[arg-type]
