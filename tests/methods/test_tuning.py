"""Which values are tried, and which is kept."""

from __future__ import annotations

import math

import pytest
import torch

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.methods import SSD, Search
from hamu_lightning.methods._evaluation import Samples, Seen
from hamu_lightning.methods._tuning import score


def samples(hits: int, loss: float, labels: tuple[int, ...] = (0, 0, 1, 1)) -> Samples:
    """Four samples of three classes; so many are right, and all have the same loss on average."""
    right, wrong = math.exp(-0.1), (1 - math.exp(-0.1)) / 2
    rows = [[wrong, wrong, wrong] for _ in labels]
    for i, label in enumerate(labels):
        rows[i][label if i < hits else 2] = right
    log_probs = torch.tensor(rows, dtype=torch.float64).log()
    found = Samples(log_probs, torch.tensor(labels))
    return Samples(log_probs + (found.loss - loss), torch.tensor(labels))


def test_values_have_equal_ratios() -> None:
    assert Search(SSD, 0.5, 8).values(5) == pytest.approx([0.5, 1, 2, 4, 8])
    assert Search(SSD, 1, 9).values(1) == [3]
    assert isinstance(Search(SSD, 1, 9).make(3.0), SSD)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (0, 1, "Expected 0 < `low` <= `high`"),
        (2, 1, "Expected 0 < `low` <= `high`"),
        (1, math.inf, "Expected `high` to be a finite number"),
        (math.nan, 1, "Expected `low` to be a finite number"),
    ],
)
def test_ranges_that_are_none(low: float, high: float, message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        Search(SSD, low, high)


def test_the_distance_in_accuracy_from_the_retrained() -> None:
    ours = Seen(samples(4, 0.1), samples(1, 2.0), samples(3, 0.5), samples(0, 9.0))
    theirs = Seen(samples(4, 0.1), samples(2, 1.0), samples(2, 0.7), samples(4, 0.1))
    assert score(ours, theirs, theirs, "retrained") == pytest.approx((0 + 0.25 + 0.25) / 3)
    # Test data play no part.
    assert score(ours, theirs, theirs, "retrained") == score(ours._replace(test=ours.val), theirs, theirs, "retrained")


def test_the_distance_in_loss_from_unseen_samples_of_the_same_classes() -> None:
    original = Seen(samples(4, 0.2), samples(4, 0.2), samples(3, 0.9), samples(3, 0.9))
    ours = Seen(samples(4, 0.25), samples(2, 0.7), samples(3, 5.0), samples(3, 9.0))
    assert score(ours, ours, original, "validation") == pytest.approx(0.2 + 0.05)
    only_ones = ours._replace(forget=samples(2, 0.7, (1, 1)))
    unseen = original.val.select(torch.tensor([2, 3])).loss
    assert unseen != pytest.approx(0.9)
    assert score(only_ones, ours, original, "validation") == pytest.approx(abs(0.7 - unseen) + 0.05)


def test_numbers_that_are_not_finite_are_infinitely_bad() -> None:
    good = Seen(*[samples(4, 0.1)] * 4)
    for tune_by in ("retrained", "validation"):
        assert score(good._replace(retain=samples(4, math.nan)), good, good, tune_by) == math.inf
        assert score(good._replace(forget=samples(4, math.inf)), good, good, tune_by) == math.inf


def test_a_class_without_validation_samples() -> None:
    good = Seen(*[samples(4, 0.1)] * 4)
    with pytest.raises(HAMUValueError, match="Expected the validation set to have samples of all classes"):
        score(good._replace(forget=samples(2, 1.0, (2, 2))), good, good, "validation")
