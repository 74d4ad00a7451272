"""Numbers of a model, against loops over samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import DataLoader

from hamu_lightning.methods._evaluation import (
    Parts,
    Samples,
    evaluate,
    evaluate_parts,
    measure,
)
from hamu_lightning.metrics.functional import average_gap, match_classes
from tests.methods.setups import build, make_samples, make_split, untouched


def make_parts() -> Parts:
    source, forget = make_split()
    sets = (source.retain, forget, source.val, source.test)
    return Parts(*(DataLoader(part, batch_size=13) for part in sets))


def test_evaluation_leaves_no_trace_and_uses_running_statistics() -> None:
    module, samples = build(batchnorm=True), make_samples(30)
    with untouched(module):
        seen = evaluate(module, DataLoader(samples, batch_size=7))
    module.eval()
    for i in range(30):
        x, y = samples[i]
        expected = torch.nn.functional.cross_entropy(module(x[None]), y[None])
        # float32 products of a batch and of one sample
        torch.testing.assert_close(seen.losses[i].float(), expected, rtol=1e-5, atol=1e-6)


def test_the_numbers_are_those_of_loops() -> None:
    parts = make_parts()
    torch.manual_seed(8)
    seen, retrained = (evaluate_parts(module, parts) for module in (build(batchnorm=True), build()))
    numbers = measure(seen, retrained)
    hits = [int(p.argmax()) == int(y) for p, y in zip(seen.forget.log_probs, seen.forget.labels, strict=True)]
    assert numbers["UA"] == pytest.approx(1 - sum(hits) / 20)
    pairs = zip(retrained.forget.log_probs, seen.forget.log_probs, strict=True)
    kl = [sum(float(r.exp() * (r - w)) for r, w in zip(*pair, strict=True)) for pair in pairs]
    assert numbers["KL"] == pytest.approx(sum(kl) / 20) and numbers["KL"] > 0
    held_out = seen.test.losses[match_classes(seen.test.labels, like=seen.forget.labels)]
    wins = [float(h > f) + 0.5 * float(h == f) for f in seen.forget.losses for h in held_out]
    assert numbers["MIA"] == pytest.approx(sum(wins) / len(wins))
    assert numbers["RA"] == seen.retain.accuracy and numbers["TA"] == seen.test.accuracy
    assert numbers["RA"] != numbers["TA"]
    assert (numbers["retain_loss"], numbers["forget_loss"]) == (seen.retain.loss, seen.forget.loss)
    assert measure(retrained, retrained)["KL"] == 0


def test_the_gap_is_the_mean_of_four() -> None:
    ours = {"UA": 0.1, "RA": 0.9, "TA": 0.8, "MIA": 0.6, "KL": 3.0}
    theirs = {"UA": 0.3, "RA": 1.0, "TA": 0.7, "MIA": 0.5, "KL": 0.0}
    assert float(average_gap(ours, theirs)) == pytest.approx((0.2 + 0.1 + 0.1 + 0.1) / 4)
    assert math.isnan(float(average_gap({**ours, "MIA": math.nan}, theirs)))


def test_no_held_out_sample_of_a_class_gives_no_auc() -> None:
    def samples(labels: list[int]) -> Samples:
        return Samples(torch.zeros(len(labels), 4).log_softmax(dim=1), torch.tensor(labels))

    seen = evaluate_parts(build(), make_parts())._replace(forget=samples([3, 3]), test=samples([0, 1, 2]))
    assert math.isnan(measure(seen, seen)["MIA"])
