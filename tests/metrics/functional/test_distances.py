"""Distances of predictions against plain loops in numpy and scipy, at their limits, and the traps of published code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import entropy
from torch import Tensor
from torch.nn import functional as F

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional import (
    Estimate,
    activation_distance,
    agreement,
    js_divergence,
    js_to_references,
    kl_divergence,
    kl_to_references,
    log_odds,
    log_odds_distance,
    zrf,
)

LN2 = math.log(2)


def logits(n: int, k: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probs(scores: Tensor) -> Any:
    z = scores.numpy()
    return np.exp(z - logsumexp(z, axis=1, keepdims=True))


def js_of_one(p: Any, q: Any) -> float:
    middle = (p + q) / 2
    return float(entropy(p, middle) + entropy(q, middle)) / 2


ORACLES: dict[str, tuple[Callable[[Tensor, Any], Estimate], Callable[[Any, Any], float]]] = {
    "js": (js_to_references, lambda p, q: js_of_one(p, q) / LN2),
    "js in nats": (lambda p, q: js_to_references(p, q, unit="nats"), js_of_one),
    "forward kl": (kl_to_references, lambda p, q: float(entropy(q, p))),
    "reverse kl": (lambda p, q: kl_to_references(p, q, direction="reverse"), lambda p, q: float(entropy(p, q))),
    "agreement": (agreement, lambda p, q: float(p.argmax() == q.argmax())),
    "activation distance": (activation_distance, lambda p, q: math.sqrt(sum((p - q) ** 2))),
    "zrf": (zrf, lambda p, q: 1 - js_of_one(p, q) / LN2),
    "log-odds": (
        lambda p, q: log_odds_distance(p, q, torch.zeros(len(p), dtype=torch.long)),
        lambda p, q: abs(math.log(p[0] / (1 - p[0])) - math.log(q[0] / (1 - q[0]))),
    ),
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize(("n", "k"), [(1, 2), (40, 2), (17, 10)])
def test_against_a_loop_over_samples_and_references(name: str, n: int, k: int) -> None:
    measure, oracle = ORACLES[name]
    ours, pool = logits(n, k, 0), [logits(n, k, seed) for seed in (1, 2, 3)]
    expected = np.mean([[oracle(p, q) for p, q in zip(probs(ours), probs(other), strict=True)] for other in pool])
    assert measure(ours, pool).value == pytest.approx(expected, abs=1e-9)
    assert measure(ours, torch.stack(pool)) == measure(ours, pool)
    one = np.mean([oracle(p, q) for p, q in zip(probs(ours), probs(pool[0]), strict=True)])
    assert measure(ours, pool[0]).value == pytest.approx(one, abs=1e-9) and measure(ours, pool[:1]) == measure(
        ours, pool[0]
    )


@pytest.mark.parametrize("name", ORACLES)
def test_logits_and_log_probabilities_give_the_same(name: str) -> None:
    measure, _ = ORACLES[name]
    ours, theirs = logits(20, 5, 0), logits(20, 5, 1)
    for form in (lambda z: z.log_softmax(1), lambda z: z - 70.0, lambda z: z.numpy(), lambda z: z.tolist()):
        given_references = [form(theirs)]
        assert measure(form(ours), given_references).value == pytest.approx(measure(ours, theirs).value, abs=1e-9)


@pytest.mark.parametrize("name", ORACLES)
def test_without_a_reference_or_a_sample_or_with_nan_there_is_no_number(name: str) -> None:
    measure, _ = ORACLES[name]
    ours, broken = logits(4, 3, 0), logits(4, 3, 1)
    broken[2, 1] = math.nan
    for value, reason in (
        (measure(ours, []), "no reference was given"),
        (measure(ours[:0], ours[:0]), "no sample was seen"),
        (measure(broken, ours), "1 of 4 predictions of the model are NaN"),
        (measure(ours, [ours, broken]), "1 of 4 predictions of the references are NaN"),
    ):
        assert math.isnan(value.value) and value.reason == reason and value.interval is None


@pytest.mark.parametrize("name", ORACLES)
def test_the_interval_is_around_the_value_and_narrows(name: str) -> None:
    measure, _ = ORACLES[name]
    few, many = (measure(logits(n, 4, 0), logits(n, 4, 1)) for n in (40, 4000))
    assert few.interval is not None and many.interval is not None
    assert few.interval[0] <= few.value <= few.interval[1]
    assert (few.interval[1] - few.interval[0]) > 5 * (many.interval[1] - many.interval[0])
    assert few.n == (40,)


def test_a_model_at_its_reference_has_the_ideal_value() -> None:
    same = logits(30, 6, 0)
    for name, (measure, _) in ORACLES.items():
        value = measure(same, same + 5.0)
        # The shift by 5 rounds the logits.
        assert value.value == pytest.approx(1.0 if name in ("agreement", "zrf") else 0.0, abs=1e-7), name


def test_probabilities_of_exactly_0() -> None:
    p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    q = torch.tensor([[0.0, 1.0, 0.0], [0.25, 0.25, 0.5]], dtype=torch.float64)
    expected = [js_of_one(a, b) for a, b in zip(p.numpy(), q.numpy(), strict=True)]
    assert js_divergence(p.log(), q.log()).tolist() == pytest.approx(expected, abs=1e-12)
    assert kl_divergence(p.log(), q.log()).tolist() == [math.inf, pytest.approx(LN2, abs=1e-12)]
    assert kl_to_references(p.log(), q.log()) == Estimate(math.inf, n=(2,), ideal=0)
    assert js_to_references(p.log(), q.log()).value <= 1


def test_log_odds_of_sure_predictions() -> None:
    z = torch.tensor([[800.0, 0.0, 0.0], [0.0, 40.0, 0.0], [0.0, 0.0, -math.inf]])
    expected = [800 - LN2, 40 - LN2, -math.inf]
    assert log_odds(z, torch.tensor([0, 1, 2])).tolist() == pytest.approx(expected, rel=1e-12)
    # From the probability itself nothing is left of it.
    p = float(z[1].softmax(0)[1])
    assert p == 1.0
    sure = torch.tensor([[1.0, 0.0]]).log()
    assert log_odds_distance(sure, sure, [0]).value == 0
    assert log_odds_distance(sure, sure.flip(1), [0]).value == math.inf


def test_an_ignored_label_has_no_log_odds() -> None:
    z = logits(3, 2, 0)
    assert log_odds(z, [0, 1, -100]).isnan().tolist() == [False, False, True]
    assert log_odds_distance(z, z, [0, 2, -100]).reason == "2 of 3 distances are NaN"


@given(st.lists(st.lists(st.floats(-500, 500), min_size=3, max_size=3), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_bounds(rows: list[list[float]]) -> None:
    p = torch.tensor(rows, dtype=torch.float64)
    q = p.flip(0) / 3
    js = js_divergence(p, q)
    assert torch.equal(js, js_divergence(q, p)) and bool(((js >= 0) & (js <= LN2)).all())
    assert bool((kl_divergence(p, q) >= 0).all())


@pytest.mark.parametrize("classes", [10, 100])
def test_the_divergence_of_published_code_is_another(classes: int) -> None:
    """`F.kl_div(log p, m)` with its default reduction: reverse, and divided by the number of classes."""
    p, q = logits(200, classes, 0), logits(200, classes, 1)
    middle = (p.softmax(1) + q.softmax(1)) / 2
    with pytest.warns(UserWarning, match="reduction: 'mean' divides the total loss"):
        naive = (F.kl_div(p.log_softmax(1), middle) + F.kl_div(q.log_softmax(1), middle)) / 2
    truth = np.mean([js_of_one(a, b) for a, b in zip(probs(p), probs(q), strict=True)])
    assert float(naive) < truth / 2  # published ZRF is near 1 for that reason alone
    assert js_to_references(p, q, unit="nats").value == pytest.approx(truth, abs=1e-9)
    assert zrf(p, q).value == pytest.approx(1 - truth / LN2, abs=1e-9)
    assert zrf(p, q).value < 0.6 < 0.8 < 1 - float(naive)
    # Summed over the classes it is still in the other direction.
    reverse = F.kl_div(p.log_softmax(1), middle, reduction="batchmean")
    assert float(reverse) == pytest.approx(
        np.mean([entropy(m, a) for m, a in zip(middle.numpy(), probs(p), strict=True)])
    )


def test_the_root_mean_square_is_another_distance() -> None:
    p, q = logits(50, 5, 0), logits(50, 5, 1)
    distances = (p.softmax(1) - q.softmax(1)).norm(dim=1)
    assert activation_distance(p, q).value == pytest.approx(float(distances.mean()), abs=1e-12)
    assert float(distances.square().mean().sqrt()) > 1.05 * activation_distance(p, q).value


def test_agreement_of_one_reference_has_wilsons_interval() -> None:
    same = logits(40, 3, 0)
    everywhere = agreement(same, same)
    assert everywhere.value == 1 and everywhere.interval is not None
    assert 0.9 < everywhere.interval[0] < 0.93 and everywhere.interval[1] == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: js_to_references(torch.ones(3), []), r"Expected `scores` to be of shape \[N, K\]"),
        (lambda: js_to_references(torch.ones(3, 1), []), "Expected `scores` to have at least 2 classes"),
        (
            lambda: js_to_references(torch.ones(3, 2), torch.ones(4, 2)),
            r"Expected `references` to be of shape \[3, 2\]",
        ),
        (lambda: js_to_references(torch.ones(3, 2), None), "Expected `references` to be of shape"),
        (lambda: js_to_references(torch.ones(3, 2), [], unit="bits"), "Expected `unit` to be one of"),  # type: ignore[arg-type]
        (lambda: kl_divergence(torch.ones(3, 2), torch.ones(2, 2)), "Expected `q` to be of shape"),
        (lambda: log_odds(torch.ones(3, 2), [0, 1]), r"Expected `labels` to be integers of shape \[3\]"),
        (lambda: log_odds(torch.ones(3, 2), [0.5, 1, 1]), "Expected `labels` to be integers"),
    ],
)
def test_other_inputs_are_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(HAMUValueError, match=words):
        call()
