"""Calibration against a loop over bins, and the trained attack against its parts."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.metrics.functional import calibration_error, trained_attack


def draw(n: int, seed: int, sureness: float = 1.0, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits + sureness * torch.nn.functional.one_hot(labels, classes), labels


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize(("n", "bins"), [(1, 15), (300, 15), (300, 4)])
def test_calibration_against_a_loop(norm: str, n: int, bins: int) -> None:
    logits, labels = draw(n, 0)
    probabilities = logits.softmax(1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [(np.mean(place == b), abs(right[place == b].mean() - confidence[place == b].mean())) for b in set(place)]
    expected = {
        "l1": sum(share * gap for share, gap in gaps),
        "l2": math.sqrt(sum(share * gap**2 for share, gap in gaps)),
        "max": max(gap for _, gap in gaps),
    }
    ours = calibration_error(logits, labels, bins=bins, norm=norm)  # type: ignore[arg-type]
    assert ours.value == pytest.approx(expected[norm], abs=1e-9)
    theirs = multiclass_calibration_error(logits.softmax(1), labels, 4, bins, norm)  # type: ignore[arg-type]
    # torchmetrics sums in float32.
    assert ours.value == pytest.approx(float(theirs), abs=1e-5)


def test_calibration_without_samples() -> None:
    assert calibration_error(torch.ones(0, 3), torch.ones(0, dtype=torch.long)).reason == "no sample was seen"
    assert calibration_error(torch.full((2, 3), math.nan), [0, 1]).reason == "2 of 2 predictions are NaN"
    sure = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).log()
    assert calibration_error(sure, [0, 1]).value == 0.5


def test_the_attack_finds_what_is_there() -> None:
    members, others, same = draw(300, 1, 4.0), draw(300, 2, 1.0), draw(300, 3, 1.0)
    found, nothing = trained_attack(*members, *others), trained_attack(*same, *others)
    assert found.value > 0.85 and found.interval is not None and found.interval[0] > 0.8
    assert nothing.interval is not None and nothing.interval[0] < 0.5 < nothing.interval[1] + 0.05
    assert found == trained_attack(*members, *others) and found.n == (300, 300)


def test_the_attack_is_near_that_on_all_samples() -> None:
    (inside, labels), (outside, other_labels) = draw(400, 1, 2.0), draw(400, 2, 1.0)
    features = []
    for scores, classes in ((inside, labels), (outside, other_labels)):
        p = scores.softmax(1).numpy()
        entropy = -(p * np.log(p)).sum(1)
        features.append(np.stack([p[range(400), classes], entropy, p.argmax(1) == classes.numpy()], 1))
    joined, truth = np.concatenate(features), np.arange(800) < 400
    joined = (joined - joined.mean(0)) / joined.std(0)
    expected = roc_auc_score(truth, LogisticRegression().fit(joined, truth).decision_function(joined))
    # Three weights from 640 samples: judged on its own training samples an attack is a little better.
    assert trained_attack(inside, labels, outside, other_labels).value == pytest.approx(expected, abs=0.02)


def test_one_trained_on_its_own_samples_sees_what_is_not_there() -> None:
    """With few samples it is above 0.5 by chance; judged on others it is not."""
    naive, ours = [], []
    for seed in range(20):
        (inside, labels), (outside, other_labels) = draw(12, 2 * seed), draw(12, 2 * seed + 1)
        p = torch.cat((inside, outside)).softmax(1)
        features, truth = p.sort(1).values[:, 1:].numpy(), np.arange(24) < 12
        naive.append(roc_auc_score(truth, LogisticRegression(C=100).fit(features, truth).decision_function(features)))
        ours.append(trained_attack(inside, labels, outside, other_labels).value)
    # The standard deviation of the AUC of 12 + 12 samples is about 0.12: 0.03 for the mean of 20.
    assert np.mean(ours) < 0.58 < 0.62 < np.mean(naive)


def test_the_attack_without_samples() -> None:
    scores, labels = draw(5, 0)
    assert trained_attack(scores[:0], labels[:0], scores, labels).reason == "no member sample was seen"
    one = trained_attack(scores[:1], labels[:1], scores, labels)
    assert one.reason == "an attack cannot be trained and judged with 1 sample of a class"
    broken = scores.where(scores < scores.max(), math.nan)
    assert trained_attack(scores, labels, broken, labels).reason == "1 of 5 predictions of held-out samples are NaN"
    assert trained_attack(scores, labels, scores, labels).is_defined
    same = torch.zeros(4, 2)
    assert trained_attack(same, [0] * 4, same, [0] * 4).value == 0.5


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(HAMUStateError, match="pip install scikit-learn"):
        trained_attack(*draw(5, 0), *draw(5, 1))


def test_other_inputs_are_refused() -> None:
    with pytest.raises(HAMUValueError, match="Expected `folds` to be at least 2"):
        trained_attack(*draw(5, 0), *draw(5, 1), folds=1)
    with pytest.raises(HAMUValueError, match="Expected `norm` to be one of"):
        calibration_error(*draw(5, 0), norm="l3")  # type: ignore[arg-type]
    with pytest.raises(HAMUValueError, match="Expected `labels` to be classes from 0 to 3"):
        calibration_error(draw(2, 0)[0], [0, -100])
