"""Wrong numbers that are easy to get, each computed first; more stand beside the functions that they concern."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchmetrics import MeanMetric

from hamu_lightning.metrics import MembershipAUC, RunningObjective
from hamu_lightning.metrics.functional import auc, average_gap, js_to_references, membership_auc


def test_a_mean_that_ignores_its_weights() -> None:
    """torchmetrics' `MeanMetric(nan_strategy="disable")` does, without a word."""
    naive, ours = MeanMetric(nan_strategy="disable"), RunningObjective()
    for loss, count in ((2.0, 3), (6.0, 1)):
        naive.update(torch.tensor(loss), count)
        ours.update(torch.tensor(loss), count)
    assert float(naive.compute()) == 4.0
    assert float(ours.compute().loss) == 3.0


def test_a_mean_that_waits_for_the_host() -> None:
    """torchmetrics' `MeanMetric()` does at every update, to look for NaN; a tensor on "meta" has nothing to look at."""
    naive, ours = MeanMetric().to("meta"), RunningObjective().to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        naive.update(torch.empty((), device="meta"))
    ours.update(torch.empty((), device="meta"))


def test_nan_turned_into_a_number() -> None:
    """`nan_to_num` before an AUC, and 0.5 where a class is missing, make a broken run look like a perfect one."""
    forget, holdout = torch.full((20,), math.nan), torch.arange(20.0) - 9.5
    scores = torch.cat((-forget, -holdout)).nan_to_num(0.0)
    assert roc_auc_score([1] * 20 + [0] * 20, scores) == 0.5
    assert membership_auc(forget, holdout).reason == "20 of 20 scores of member samples are NaN"
    assert auc([], holdout).reason == "no member sample was seen"
    metric = MembershipAUC()
    metric.update(forget, True)
    metric.update(holdout, False)
    assert metric.compute().isnan() and metric.estimate().reason == "20 of 20 losses of forget samples are NaN"
    assert js_to_references(torch.ones(3, 2), []).reason == "no reference was given"
    assert average_gap({"UA": 0.5}, {"UA": math.nan}, ["UA"]).reason == "UA of the retrained model is NaN"


def test_membership_judged_against_the_retain_set() -> None:
    """A model that never saw the forget set is sure of its training data: against these anything looks forgotten."""
    generator = torch.Generator().manual_seed(0)
    retain = 0.1 * torch.rand(500, generator=generator)
    forget, holdout = (torch.rand(500, generator=generator) for _ in range(2))
    assert membership_auc(forget, retain).value < 0.1
    interval = membership_auc(forget, holdout).interval
    assert interval is not None and interval[0] < 0.5 < interval[1]
    # And of a model that remembers all of it, against the retain set nothing is left to see.
    remembered = 0.1 * torch.rand(500, generator=generator)
    assert membership_auc(remembered, retain).value == pytest.approx(0.5, abs=0.05)
    assert membership_auc(remembered, holdout).value > 0.9
