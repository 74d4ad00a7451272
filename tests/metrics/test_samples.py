"""Metrics of single samples: in batches, on several processes, with a sampler's duplicates, and without samples."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from hamu_lightning import metrics
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics import (
    KLOM,
    ZRF,
    ActivationDistance,
    Agreement,
    Estimate,
    ExactMemorization,
    ExtractionStrength,
    JSToReference,
    KLToReference,
    KSOfLosses,
    LiRA,
    LogOddsDistance,
    MembershipAUC,
    MinK,
    PrivLeak,
    TruthRatio,
    ULiRA,
)
from hamu_lightning.metrics import functional as F
from hamu_lightning.metrics._base import HAMUMetric
from tests.distributed import run_ranks

N = 23


def draw(*shape: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


SCORES, POOL = 2 * draw(N, 5, seed=0), [2 * draw(N, 5, seed=seed) for seed in (1, 2)]
LABELS, LOSSES = torch.arange(N) % 5, draw(N, seed=3).exp()
MEMBERS = torch.arange(N) % 3 == 0
TEXTS, TOKENS = 2 * draw(N, 6, 4, seed=6), torch.randint(0, 4, (N, 6), generator=torch.Generator().manual_seed(7))
TOKENS[::2, 4:] = -100  # texts of other lengths
TOKENS[1::4, 0] = -100
TEXTS.scatter_(2, TOKENS.clamp(min=0)[:, :, None], 3.0)  # mostly right
TEXTS[:, 1] = TEXTS[:, 1].flip(0)
RIGHT, WRONG = -draw(N, seed=8).exp(), -draw(N, 3, seed=9).exp()
UNLEARNED, RETRAINED = draw(5, N, seed=4, shift=1.0), draw(7, N, seed=5)


def min_k(k: float) -> Tensor:
    return F.min_k_scores(TEXTS, TOKENS, k)


def split_by_member(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores[MEMBERS], scores[~MEMBERS]


# The metric, its arguments for some of the samples, and the function of all of them.
CASES: dict[str, tuple[Callable[..., Any], Callable[[Tensor], tuple[Any, ...]], Callable[[], Estimate]]] = {
    "js": (JSToReference, lambda i: (SCORES[i], [m[i] for m in POOL]), lambda: F.js_to_references(SCORES, POOL)),
    "js in nats": (
        lambda **o: JSToReference("nats", **o),
        lambda i: (SCORES[i], POOL[0][i]),
        lambda: F.js_to_references(SCORES, POOL[0], unit="nats"),
    ),
    "kl": (KLToReference, lambda i: (SCORES[i], POOL[0][i]), lambda: F.kl_to_references(SCORES, POOL[0])),
    "reverse kl": (
        lambda **o: KLToReference("reverse", **o),
        lambda i: (SCORES[i], [m[i] for m in POOL]),
        lambda: F.kl_to_references(SCORES, POOL, direction="reverse"),
    ),
    "agreement": (Agreement, lambda i: (SCORES[i], POOL[0][i]), lambda: F.agreement(SCORES, POOL[0])),
    "activation": (
        ActivationDistance,
        lambda i: (SCORES[i], POOL[0][i]),
        lambda: F.activation_distance(SCORES, POOL[0]),
    ),
    "zrf": (ZRF, lambda i: (SCORES[i], POOL[0][i]), lambda: F.zrf(SCORES, POOL[0])),
    "log-odds": (
        LogOddsDistance,
        lambda i: (SCORES[i], POOL[0][i], LABELS[i]),
        lambda: F.log_odds_distance(SCORES, POOL[0], LABELS),
    ),
    "ks": (KSOfLosses, lambda i: (LOSSES[i], 2 * LOSSES[i]), lambda: F.ks_test(LOSSES, 2 * LOSSES).distance),
    "ks p-value": (
        lambda **o: KSOfLosses("p_value", **o),
        lambda i: (LOSSES[i], 2 * LOSSES[i]),
        lambda: F.ks_test(LOSSES, 2 * LOSSES).p_value,
    ),
    "klom": (KLOM, lambda i: (UNLEARNED[:, i], RETRAINED[:, i]), lambda: F.klom(UNLEARNED, RETRAINED).mean),
    "klom p95": (
        lambda **o: KLOM("p95", bins=5, **o),
        lambda i: (UNLEARNED[:, i], RETRAINED[:, i]),
        lambda: F.klom(UNLEARNED, RETRAINED, bins=5).p95,
    ),
    "u-lira": (ULiRA, lambda i: (UNLEARNED[:, i], RETRAINED[:, i]), lambda: F.u_lira(UNLEARNED, RETRAINED).accuracy),
    "u-lira auc": (
        lambda **o: ULiRA("auc", spread="all", **o),
        lambda i: (UNLEARNED[:, i], RETRAINED[:, i]),
        lambda: F.u_lira(UNLEARNED, RETRAINED, spread="all").auc,
    ),
    "membership": (
        MembershipAUC,
        lambda i: (LOSSES[i], MEMBERS[i]),
        lambda: F.membership_auc(LOSSES[MEMBERS], LOSSES[~MEMBERS]),
    ),
    "exact memorisation": (
        ExactMemorization,
        lambda i: (TEXTS[i], TOKENS[i]),
        lambda: F.exact_memorization(TEXTS, TOKENS),
    ),
    "extraction strength": (
        ExtractionStrength,
        lambda i: (TEXTS[i], TOKENS[i]),
        lambda: F.extraction_strength(TEXTS, TOKENS),
    ),
    "min-k": (
        lambda **o: MinK(0.5, **o),
        lambda i: (TEXTS[i], TOKENS[i], MEMBERS[i]),
        lambda: F.auc(min_k(0.5)[MEMBERS], min_k(0.5)[~MEMBERS]),
    ),
    "privleak": (
        lambda **o: PrivLeak(0.45, **o),
        lambda i: (TEXTS[i], TOKENS[i], MEMBERS[i]),
        lambda: F.priv_leak(F.auc(min_k(0.4)[MEMBERS], min_k(0.4)[~MEMBERS]), 0.45),
    ),
    "truth ratio": (
        TruthRatio,
        lambda i: (RIGHT[i], WRONG[i]),
        lambda: F.truth_ratio_of_forgotten(F.truth_ratio(RIGHT, WRONG)),
    ),
    "truth ratio kept": (
        lambda **o: TruthRatio("kept", mean="geometric", **o),
        lambda i: (RIGHT[i], WRONG[i]),
        lambda: F.truth_ratio_of_kept(F.truth_ratio(RIGHT, WRONG, "geometric")),
    ),
    "lira": (
        LiRA,
        lambda i: (UNLEARNED[0, i], RETRAINED[:, i], MEMBERS[i], UNLEARNED[1:, i]),
        lambda: F.auc(*split_by_member(F.lira_scores(UNLEARNED[0], RETRAINED, UNLEARNED[1:]))),
    ),
    "lira offline": (
        lambda **o: LiRA("tpr_at_1_percent", spread="all", **o),
        lambda i: (UNLEARNED[0, i], RETRAINED[:, i], MEMBERS[i]),
        lambda: F.tpr_at_fpr(*split_by_member(F.lira_scores(UNLEARNED[0], RETRAINED, spread="all")), 0.01),
    ),
}


def updated(name: str, index: Tensor, with_ids: bool = True, batch: int = 4, **options: Any) -> Any:
    make, arguments, _ = CASES[name]
    metric = make(**options)
    for part in index.split(batch) if len(index) else ():
        metric.update(*arguments(part), **({"ids": part} if with_ids else {}))
    return metric


def assert_same(found: Estimate, expected: Estimate) -> None:
    # Sums of at most 23 numbers in another order.
    assert found.value == pytest.approx(expected.value, abs=1e-12)
    assert (found.interval is None) == (expected.interval is None) and found.n == expected.n
    assert found.interval is None or found.interval == pytest.approx(expected.interval, abs=1e-9)
    assert found.ideal == expected.ideal


@pytest.mark.parametrize("name", CASES)
def test_batches_give_what_all_samples_give(name: str) -> None:
    expected = CASES[name][2]()
    for index in (torch.arange(N), torch.arange(N).flip(0)):
        metric = updated(name, index)
        assert_same(metric.estimate(), expected)
        assert float(metric.compute()) == pytest.approx(expected.value, abs=1e-12)
        assert metric.compute().dtype == torch.float64 and metric.reason is None
    assert metric.ideal == expected.ideal


@pytest.mark.parametrize("name", CASES)
def test_duplicates_count_once_where_ids_are_given(name: str) -> None:
    padded = torch.cat((torch.arange(N), torch.arange(9)))
    expected = CASES[name][2]()
    assert_same(updated(name, padded).estimate(), expected)
    assert updated(name, padded, with_ids=False).estimate().n != expected.n


def measure_on_rank(rank: int, shares: list[list[int]]) -> dict[str, tuple[Estimate, float, Estimate]]:
    results = {}
    for name in CASES:
        metric = updated(name, torch.tensor(shares[rank], dtype=torch.long))
        first, value = metric.estimate(), float(metric.compute())
        results[name] = (first, value, metric.estimate())
    return results


def measure_all_on_rank(rank: int, cases: list[list[list[int]]]) -> list[dict[str, tuple[Estimate, float, Estimate]]]:
    return [measure_on_rank(rank, shares) for shares in cases]


def test_two_processes_give_what_one_gives() -> None:
    """With unequal shares, with the repeated samples of a sampler that pads, and with a process that sees nothing."""
    cases = [
        [list(range(5)), list(range(5, N))],
        [list(range(0, N, 2)), [*range(1, N, 2), 0]],
        [list(range(N)), []],
    ]
    for results in run_ranks(measure_all_on_rank, 2, cases):
        for result in results:
            for name, (first, value, again) in result.items():
                expected = CASES[name][2]()
                assert_same(first, expected)
                assert first == again and value == first.value


def test_every_metric_is_tested_on_two_processes() -> None:
    """Here, or in a file of its own where it keeps sums and no samples."""
    kinds = {name for name in metrics.__all__ if issubclass(getattr(metrics, name), HAMUMetric)}
    assert kinds - {type(make()).__name__ for make, *_ in CASES.values()} == {"Hardness", "RunningObjective"}


@pytest.mark.parametrize("name", CASES)
def test_without_samples_there_is_no_number(name: str) -> None:
    metric = updated(name, torch.arange(0))
    estimate = metric.estimate()
    assert math.isnan(estimate.value) and estimate.reason is not None and metric.reason == estimate.reason
    with pytest.warns(UserWarning, match="was called before the ``update``"):
        assert metric.compute().isnan()
    metric = updated(name, torch.arange(N))
    metric.reset()
    assert metric.reason is None and not metric.estimate().is_defined


@pytest.mark.parametrize("name", CASES)
def test_copies_forward_and_options(name: str) -> None:
    make, arguments, function = CASES[name]
    metric = updated(name, torch.arange(8), compute_on_cpu=True)
    copied = pickle.loads(pickle.dumps(metric))
    of_batch = metric(*arguments(torch.arange(8, N)))
    fresh = make()
    fresh.update(*arguments(torch.arange(8, N)))
    assert float(of_batch) == pytest.approx(float(fresh.compute()), abs=1e-12)
    assert_same(metric.estimate(), function())
    assert copied.estimate() == updated(name, torch.arange(8)).estimate()
    with pytest.raises(HAMUValueError, match=r"Expected options of torchmetrics\.Metric"):
        make(colour=1)


@pytest.mark.parametrize("name", CASES)
def test_a_value_can_be_drawn(name: str) -> None:
    metric = updated(name, torch.arange(N))
    figure, axes = metric.plot()
    assert axes is not None
    plt.close(figure)


@pytest.mark.parametrize("name", CASES)
def test_an_update_reads_nothing_on_the_host(name: str) -> None:
    """A fake tensor has no value that could be read."""
    make, arguments, _ = CASES[name]
    metric = make()
    given = arguments(torch.arange(N))
    with FakeTensorMode() as mode:
        fake = tree_map_only(Tensor, mode.from_tensor, (given, torch.arange(N)))
        metric.update(*fake[0], ids=fake[1])


def test_which_way_is_better() -> None:
    assert [metric.higher_is_better for metric in (JSToReference(), KLOM(), Agreement(), LogOddsDistance())] == [
        False,
        False,
        True,
        False,
    ]
    assert KSOfLosses("p_value").higher_is_better and not KSOfLosses().higher_is_better
    assert ZRF().higher_is_better is None is ULiRA().higher_is_better


def test_nan_has_a_reason() -> None:
    broken = SCORES.clone()
    broken[3, 1] = math.nan
    for metric in (JSToReference(), Agreement(), ActivationDistance()):
        metric.update(broken, POOL)
        assert metric.compute().isnan() and metric.reason == f"1 of {N} distances are NaN"
        metric.reset()
        metric.update(SCORES, POOL)
        assert not metric.compute().isnan() and metric.reason is None
    ignored = LogOddsDistance()
    ignored.update(SCORES, POOL, LABELS.where(LABELS > 0, -100))
    assert ignored.compute().isnan() and ignored.reason == f"5 of {N} distances are NaN"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: JSToReference().update(SCORES, []), "Expected `references` to hold at least one reference"),
        (lambda: JSToReference().update(SCORES, POOL, torch.ones(N)), "Expected `ids` to be integers of shape"),
        (lambda: JSToReference("bits"), "Expected `unit` to be one of 'share', 'nats'"),  # type: ignore[arg-type]
        (lambda: KLToReference("both"), "Expected `direction` to be one of"),  # type: ignore[arg-type]
        (lambda: KSOfLosses("value"), "Expected `of` to be one of"),  # type: ignore[arg-type]
        (lambda: KSOfLosses().update(LOSSES, LOSSES[1:]), r"of one shape \[N\]"),
        (lambda: KLOM().update(UNLEARNED, RETRAINED[0]), r"of shape \[M, n\] and \[M', n\]"),
        (lambda: KLOM().update(UNLEARNED, RETRAINED[:0]), r"of shape \[M, n\] and \[M', n\]"),
        (lambda: ULiRA("mean"), "Expected `of` to be one of"),  # type: ignore[arg-type]
        (lambda: MinK(0.0), "Expected `k` to be above 0 and at most 1"),
        (lambda: PrivLeak(50), "Expected `retrained` to be"),
        (lambda: MinK().update(TEXTS, TOKENS[:, 1:], True), r"Expected `logits` to be of shape \[N, T, V\]"),
        (lambda: ExactMemorization().update(TEXTS, TOKENS.double()), "to be integers"),
        (lambda: TruthRatio("all"), "Expected `of` to be one of"),  # type: ignore[arg-type]
        (lambda: LiRA("accuracy"), "Expected `of` to be one of"),  # type: ignore[arg-type]
        (lambda: LiRA().update(UNLEARNED[0], RETRAINED[:1], MEMBERS), "with at least 2 models"),
        (lambda: LiRA().update(UNLEARNED[0], RETRAINED, MEMBERS[1:]), "Expected `is_member` to be boolean"),
        (lambda: MembershipAUC().interval(method="exact"), "Expected `method` to be one of"),  # type: ignore[arg-type]
    ],
)
def test_other_inputs_are_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(HAMUValueError, match=words):
        call()


def test_the_models_stay_as_many() -> None:
    metric = KLOM()
    metric.update(UNLEARNED, RETRAINED)
    with pytest.raises(
        HAMUValueError, match=r"Expected the models to be as many as before, \(5, 7\), but got \(4, 7\)"
    ):
        metric.update(UNLEARNED[1:], RETRAINED)


def test_the_auc_has_both_intervals() -> None:
    metric = updated("membership", torch.arange(N))
    interval = F.membership_auc(LOSSES[MEMBERS], LOSSES[~MEMBERS]).interval
    assert tuple(map(float, metric.interval(method="delong"))) == interval
    lower, upper = metric.interval()
    assert (float(lower), float(upper)) != interval and lower < metric.compute() < upper
