"""Metrics of language models against loops over texts and tokens."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor, nn

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional import (
    auc,
    exact_memorization,
    extraction_strength,
    gradient_norm_scores,
    min_k_plus_plus_scores,
    min_k_scores,
    reference_scores,
    token_losses,
    zlib_scores,
)

V = 7
LENGTHS = [1, 4, 9, 12]


def make_texts() -> tuple[Tensor, Tensor]:
    """Four texts of other lengths, padded in front and behind; what stands at the padding is large."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 14, V, generator=generator, dtype=torch.float64)
    labels = torch.full((4, 14), -100)
    for n, length in enumerate(LENGTHS):
        labels[n, 1 : 1 + length] = torch.randint(V, (length,), generator=generator)
        # Half of the tokens are predicted, so that there is something to count.
        right = torch.rand(length, generator=generator) < 0.5
        logits[n, 1 : 1 + length] += 6.0 * right[:, None] * nn.functional.one_hot(labels[n, 1 : 1 + length], V)
        logits[n, 1 + length :] = 1e4
    return logits, labels


LOGITS, LABELS = make_texts()


def loop() -> list[tuple[Any, Any]]:
    """Of each text the log-probabilities and labels where there are labels."""
    texts = []
    for n in range(4):
        places = [t for t in range(14) if LABELS[n, t] != -100]
        texts.append((log_softmax(LOGITS[n, places].numpy(), axis=1), LABELS[n, places].numpy()))
    return texts


def of_labels(log_p: Any, labels: Any) -> Any:
    return np.array([row[label] for row, label in zip(log_p, labels, strict=True)])


def lowest(values: Any, k: float) -> float:
    return float(np.mean(sorted(values)[: max(1, int(k * len(values)))]))


def test_losses_per_token_and_per_text() -> None:
    losses = token_losses(LOGITS, LABELS)
    texts = [-of_labels(*text) for text in loop()]
    assert losses.samples.tolist() == pytest.approx([text.mean() for text in texts], abs=1e-9)
    assert losses.per_sample.value == pytest.approx(np.mean([text.mean() for text in texts]), abs=1e-9)
    assert losses.per_token.value == pytest.approx(np.concatenate(texts).mean(), abs=1e-9)
    assert losses.per_token.n == (sum(LENGTHS),) and losses.per_sample.n == (4,)
    assert abs(losses.per_token.value - losses.per_sample.value) > 0.05
    theirs = nn.functional.cross_entropy(LOGITS.transpose(1, 2), LABELS)
    assert losses.per_token.value == pytest.approx(float(theirs), abs=1e-9)


def test_a_mean_over_batches_is_another_number() -> None:
    """The mean of batch means, as published loops take it, weighs a batch of short texts like one of long ones."""
    batches = [nn.functional.cross_entropy(LOGITS[b].transpose(1, 2), LABELS[b]) for b in ([0, 1], [2, 3])]
    assert abs(float(sum(batches) / 2) - token_losses(LOGITS, LABELS).per_token.value) > 0.01


@pytest.mark.parametrize("k", [0.1, 0.2, 0.4, 0.5, 1.0])
def test_min_k(k: float) -> None:
    expected = [lowest(of_labels(*text), k) for text in loop()]
    assert min_k_scores(LOGITS, LABELS, k).tolist() == pytest.approx(expected, abs=1e-9)
    standardised = []
    for log_p, labels in loop():
        p = np.exp(log_p)
        mean = (p * log_p).sum(1)
        sd = np.sqrt((p * (log_p - mean[:, None]) ** 2).sum(1))
        standardised.append(lowest((of_labels(log_p, labels) - mean) / sd, k))
    assert min_k_plus_plus_scores(LOGITS, LABELS, k).tolist() == pytest.approx(standardised, abs=1e-9)


def test_a_number_without_its_k_cannot_be_compared() -> None:
    few, many = min_k_scores(LOGITS, LABELS, 0.1), min_k_scores(LOGITS, LABELS, 0.4)
    assert bool((few <= many).all()) and float((many - few).max()) > 0.1


def test_a_share_is_not_rounded_down() -> None:
    """0.29 * 100 is 28.999999999999996."""
    logits = torch.zeros(1, 100, 2)
    logits[0, :, 0] = torch.arange(100.0) / 10
    scores = min_k_scores(logits, torch.zeros(1, 100, dtype=torch.long), 0.29)
    expected = logits[0].double().log_softmax(1)[:29, 0].mean()
    assert float(scores) == pytest.approx(float(expected), abs=1e-9)


def test_sure_and_uniform_predictions() -> None:
    sure = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).log()
    assert min_k_scores(sure, [[0, 1]]).tolist() == [0.0] and min_k_scores(sure, [[0, 0]]).tolist() == [-math.inf]
    assert min_k_plus_plus_scores(sure, [[0, 1]]).tolist() == [0.0]
    assert min_k_plus_plus_scores(sure, [[0, 0]]).tolist() == [-math.inf]
    # Equal numbers whose logarithm is rounded.
    assert min_k_plus_plus_scores(torch.full((1, 3, 50_000), 7.3), [[4, 5, 6]]).tolist() == [0.0]
    assert token_losses(sure, [[0, 1]]).per_token.value == 0


def test_memorisation_against_loops() -> None:
    right = [(log_p.argmax(1) == labels) for log_p, labels in loop()]
    assert exact_memorization(LOGITS, LABELS).value == pytest.approx(np.mean([r.mean() for r in right]), abs=1e-12)
    strengths = []
    for r in right:
        k = next(k for k in range(len(r) + 1) if all(r[k:]))
        strengths.append(1 - k / len(r))
    assert extraction_strength(LOGITS, LABELS).value == pytest.approx(np.mean(strengths), abs=1e-12)
    assert exact_memorization(LOGITS, LABELS).n == (4,)


def test_the_last_token_counts() -> None:
    """Published code leaves it out of its scores, the end of an answer included."""
    logits, labels = LOGITS[1:], LABELS[1:]  # the first text has one token
    naive = labels.clone()
    for row in naive:
        row[row.ne(-100).nonzero()[-1]] = -100
    for function in (exact_memorization, extraction_strength):
        assert abs(function(logits, naive).value - function(logits, labels).value) > 0.01
    assert not torch.allclose(min_k_scores(logits, naive, 1.0), min_k_scores(logits, labels, 1.0), atol=0.01)


@pytest.mark.parametrize(
    ("predicted", "strength"), [([0, 1, 2, 0], 0.75), ([1, 1, 2, 1], 1.0), ([1, 1, 2, 0], 0.0), ([0, 0, 0, 1], 0.25)]
)
def test_extraction_strength_at_its_ends(predicted: list[int], strength: float) -> None:
    """A text of which not even the last token is right has 0, where published code has 1 / T."""
    labels = torch.tensor([[1, 1, 2, 1 if strength else 2]])
    if strength == 0.75:
        labels = torch.tensor([[1, 1, 2, 0]])
    logits = nn.functional.one_hot(torch.tensor([predicted]), 3).double()
    assert extraction_strength(logits, labels).value == strength
    for k in range(4):  # as published: the loop ends with k = 3 at the latest
        if predicted[k:] == labels[0, k:].tolist():
            break
    assert 1 - k / 4 == (strength or 0.25)


def test_a_text_without_labels_has_no_number() -> None:
    labels = LABELS.clone()
    labels[2] = -100
    losses = token_losses(LOGITS, labels)
    for value in (losses.per_token, losses.per_sample, exact_memorization(LOGITS, labels)):
        assert value.reason == "1 of 4 texts have no labels"
    for scores in (losses.samples, min_k_scores(LOGITS, labels), min_k_plus_plus_scores(LOGITS, labels)):
        assert scores.isnan().tolist() == [False, False, True, False]
    assert extraction_strength(LOGITS[:0], labels[:0]).reason == "no sample was seen"
    assert min_k_scores(LOGITS[:0], labels[:0]).shape == (0,)


def test_nan_is_not_hidden() -> None:
    logits = LOGITS.clone()
    logits[1, 2, 0] = math.nan
    for value in (
        token_losses(logits, LABELS).per_token,
        token_losses(logits, LABELS).per_sample,
        exact_memorization(logits, LABELS),
        extraction_strength(logits, LABELS),
    ):
        assert value.reason == "1 of 4 texts are NaN"
    for scores in (min_k_scores(logits, LABELS, 0.1), min_k_plus_plus_scores(logits, LABELS, 0.1)):
        assert scores.isnan().tolist() == [False, True, False, False]
        assert auc(scores[:2], scores[2:]).reason == "1 of 2 scores of member samples are NaN"


def test_zlib_and_reference_scores() -> None:
    losses, texts = [2.0, 3.0], ["a" * 50, "Jane Doe lives here"]
    expected = [-loss / len(zlib.compress(text.encode())) for loss, text in zip(losses, texts, strict=True)]
    assert zlib_scores(losses, texts).tolist() == pytest.approx(expected, abs=1e-12)
    assert reference_scores(losses, [1.0, 5.0]).tolist() == [-1.0, 2.0]


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_gradient_norms_against_a_loop(p: float) -> None:
    torch.manual_seed(0)
    model, unused = nn.Linear(3, 2).double(), nn.Parameter(torch.ones(2))
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 2
    weights = [*model.parameters(), unused]
    scores = gradient_norm_scores(nn.functional.cross_entropy(model(x), y, reduction="none"), weights, p)
    expected = []
    for n in range(5):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1]).backward()
        expected.append(-sum(float((w.grad.abs() ** p).sum() ** (1 / p)) for w in model.parameters()) / 3)  # type: ignore[union-attr]
    assert scores.tolist() == pytest.approx(expected, abs=1e-9) and not scores.requires_grad


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: token_losses(LOGITS, LABELS[:, 1:]), r"Expected `logits` to be of shape \[N, T, V\]"),
        (lambda: token_losses(LOGITS, LABELS.double()), "`labels` to be integers"),
        (lambda: token_losses(LOGITS[..., :3], LABELS), "Expected `labels` to be -100 or below 3"),
        (lambda: min_k_scores(LOGITS, LABELS, 20), "Expected `k` to be above 0 and at most 1"),
        (lambda: zlib_scores([1.0], ["a", "b"]), "Expected `texts` to hold 1 strings"),
        (lambda: reference_scores([1.0], [1.0, 2.0]), "Expected `reference_losses` to be of shape"),
        (lambda: gradient_norm_scores(torch.ones(2), [torch.ones(1)]), "with a graph"),
    ],
)
def test_other_inputs_are_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(HAMUValueError, match=words):
        call()
