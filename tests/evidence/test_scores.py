"""The numbers of one evaluation, against loops over samples."""

from __future__ import annotations

import math

import pytest
import torch

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.evidence import Evaluation, PartScores


def make_scores(n: int, classes: list[int], seed: int) -> PartScores:
    random = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(n, 5, generator=random, dtype=torch.float64).mul(2).log_softmax(1)
    labels = torch.tensor(classes)[torch.randint(len(classes), (n,), generator=random)]
    losses = -log_probs[torch.arange(n), labels]
    return PartScores(losses, (log_probs.argmax(1) == labels).double(), torch.arange(n), log_probs, labels)


def make_evaluation(
    seed: int = 0, forget: tuple[int, ...] = (3, 4), retain: tuple[int, ...] = (0, 1, 2, 3)
) -> Evaluation:
    sizes = {"retain": (40, retain), "forget": (30, forget), "holdout": (50, range(5)), "test": (60, range(5))}
    return Evaluation(
        {name: make_scores(n, [*classes], seed + i) for i, (name, (n, classes)) in enumerate(sizes.items())}
    )


def test_numbers_are_those_of_loops() -> None:
    evaluation = make_evaluation()
    numbers, parts = evaluation.numbers(), evaluation.parts
    right = [int(p.argmax()) == int(y) for p, y in zip(parts["forget"].log_probs, parts["forget"].labels, strict=True)]
    assert numbers["FA"].value == pytest.approx(sum(right) / 30) == 1 - numbers["UA"].value
    assert numbers["UA"].interval == pytest.approx(tuple(1 - x for x in reversed(numbers["FA"].interval or ())))
    kept = [i for i, y in enumerate(parts["test"].labels.tolist()) if y != 4]
    expected = sum(int(parts["test"].log_probs[i].argmax()) == int(parts["test"].labels[i]) for i in kept) / len(kept)
    assert evaluation.gone.tolist() == [4] and numbers["TA"].value == pytest.approx(expected)
    held_out = evaluation.comparable()
    assert held_out is not None and set(held_out.labels.tolist()) == {3, 4}
    pairs = [(float(f), float(h)) for f in parts["forget"].losses for h in held_out.losses]
    wins = sum((h > f) + 0.5 * (h == f) for f, h in pairs)
    assert numbers["auc"].value == pytest.approx(wins / len(pairs), abs=1e-12)
    assert numbers["retain_loss"].value == pytest.approx(float(parts["retain"].losses.mean()))
    assert {"trained_attack", "calibration", "tpr_at_1", "tpr_at_0.1"} <= set(numbers)


def test_changes_and_distances_are_of_the_same_samples() -> None:
    before, after = make_evaluation(0), make_evaluation(9)
    since = after.since(before)
    difference = after.parts["forget"].losses - before.parts["forget"].losses
    assert since["forget_change"].value == pytest.approx(float(difference.mean()))
    assert since["surer"].value == pytest.approx(float((difference < 0).double().mean()))
    assert set(since) == {"retain_change", "forget_change", "holdout_change", "test_change", "surer"}
    assert after.distances([after])["js"].value < 1e-15 and after.distances([before])["js"].value > 0.01


def test_what_is_missing_is_nan_with_a_reason() -> None:
    evaluation = make_evaluation(forget=(4,))
    forget = evaluation.parts["forget"]
    alone = Evaluation({"forget": forget})
    assert "no held-out data" in (alone.numbers()["auc"].reason or "")
    other = evaluation.parts["holdout"]
    others = other.select(other.labels != 4) if other.labels is not None else other
    assert "forgotten classes" in (Evaluation({"forget": forget, "holdout": others}).numbers()["auc"].reason or "")
    assert all(math.isnan(x.value) for x in alone.distances([]).values())
    bare = PartScores(forget.losses, torch.full_like(forget.losses, math.nan), forget.ids)
    assert math.isnan(Evaluation({"forget": bare}).numbers()["UA"].value)
    found = Evaluation({"forget": bare}).distances([Evaluation({"forget": bare})])
    assert found["ks"].value == 0 and "classifier" in (found["js"].reason or "")


def test_wrong_parts_are_refused() -> None:
    scores = make_scores(3, [0], 0)
    with pytest.raises(HAMUValueError, match="'retian'"):
        Evaluation({"forget": scores, "retian": scores})
    with pytest.raises(HAMUValueError, match="data to forget"):
        Evaluation({"retain": scores})
    with pytest.raises(HAMUValueError, match="lengths"):
        PartScores(scores.losses, scores.recognised[:2], scores.ids)
