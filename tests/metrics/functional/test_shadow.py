"""LiRA, U-LiRA and KLOM against scipy and numpy, sample by sample."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.stats import entropy, norm
from torch import Tensor

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional import auc, klom, lira_scores, log_odds, u_lira


def draw(models: int, samples: int, shift: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(models, samples, generator=generator, dtype=torch.float64) + shift


@pytest.mark.parametrize("spread", ["sample", "all"])
def test_lira_against_scipy(spread: Literal["sample", "all"]) -> None:
    phi, outside, inside = draw(1, 30, 1.0, 1)[0], draw(6, 30, 0.0, 2), draw(9, 30, 3.0, 3)
    scores = lira_scores(phi, outside, inside, spread=spread)
    offline = lira_scores(phi, outside, spread=spread)
    sd_in, sd_out = (
        kind.numpy().std(axis=0) if spread == "sample" else np.sqrt(kind.numpy().var(axis=0).mean())
        for kind in (inside, outside)
    )
    mean_in, mean_out = inside.numpy().mean(axis=0), outside.numpy().mean(axis=0)
    expected = norm.logpdf(phi.numpy(), mean_in, sd_in) - norm.logpdf(phi.numpy(), mean_out, sd_out)
    assert scores.numpy() == pytest.approx(expected, abs=1e-9)
    assert offline.numpy() == pytest.approx(-norm.logsf(phi.numpy(), mean_out, sd_out), abs=1e-9)


def test_offline_lira_is_one_sided() -> None:
    """A two-sided density, as in published code, accuses samples that are less sure than all others."""
    outside = draw(50, 1, 0.0)
    phi = torch.linspace(-12, 12, 25, dtype=torch.float64)
    scores = torch.cat([lira_scores(p[None], outside) for p in phi])
    assert bool((scores.diff() > 0).all())
    two_sided = -norm.logpdf(phi.numpy(), float(outside.mean()), float(outside.std()))
    assert two_sided[0] > two_sided[12] < two_sided[-1]
    # 1 - P(Z > phi) itself rounds to 1 for the surest samples, and ranks them no more.
    sure = torch.tensor([60.0, 80.0], dtype=torch.float64)
    ours = torch.cat([lira_scores(p[None], outside) for p in sure])
    assert ours[0] < ours[1] and norm.cdf(60 / 2) == norm.cdf(80 / 2)


def test_lira_finds_members_and_nothing_where_there_is_nothing() -> None:
    outside, inside = draw(40, 500, 0.0, 1), draw(40, 500, 3.0, 2)
    member, other = draw(1, 500, 3.0, 3)[0], draw(1, 500, 0.0, 4)[0]
    found = auc(lira_scores(member, outside, inside), lira_scores(other, outside, inside))
    # Two normal distributions 1.5 standard deviations apart; 40 models blur the threshold a little.
    assert found.value == pytest.approx(norm.cdf(1.5 / math.sqrt(2)), abs=0.03)
    same = auc(lira_scores(other, outside, outside), lira_scores(other, outside, outside))
    assert same.value == 0.5


def test_shadow_models_that_agree() -> None:
    outside, inside = torch.zeros(3, 2), torch.ones(3, 2)
    scores = lira_scores(torch.tensor([0.0, 1.0]), outside, inside)
    assert scores[0] < 0 < scores[1] and bool(scores.isfinite().all())


def u_lira_by_loops(unlearned: Any, retrained: Any) -> list[float]:
    accuracies = []
    for x in range(unlearned.shape[1]):
        right = []
        for left in range(min(len(unlearned), len(retrained))):
            ours, theirs = (np.delete(kind[:, x], left) for kind in (unlearned, retrained))
            for value, kind in ((unlearned[left, x], 1), (retrained[left, x], -1)):
                ratio = norm.logpdf(value, ours.mean(), ours.std()) - norm.logpdf(value, theirs.mean(), theirs.std())
                right.append(ratio * kind > 0)
        accuracies.append(float(np.mean(right)))
    return accuracies


@pytest.mark.parametrize(("models", "others"), [(3, 3), (4, 7), (6, 5)])
def test_u_lira_against_loops(models: int, others: int) -> None:
    unlearned, retrained = draw(models, 20, 1.0, 1), draw(others, 20, 0.0, 2)
    result = u_lira(unlearned, retrained)
    expected = u_lira_by_loops(unlearned.numpy(), retrained.numpy())
    assert result.per_sample.tolist() == pytest.approx(expected, abs=1e-12)
    assert result.accuracy.value == pytest.approx(np.mean(expected), abs=1e-12)
    assert result.accuracy.n == (models, others, 20)


def test_chance_is_a_half_where_a_plain_leave_one_out_gives_less() -> None:
    ours, theirs = draw(4, 20000, 0.0, 1), draw(4, 20000, 0.0, 2)
    alone = []
    for left in range(4):
        rest = [torch.cat((kind[:left], kind[left + 1 :])) for kind in (ours, theirs)]
        alone.append((lira_scores(ours[left], theirs, rest[0]) > 0).double().mean())
        alone.append((lira_scores(theirs[left], rest[1], ours) <= 0).double().mean())
    result = u_lira(ours, theirs).accuracy
    # The standard error over 8 models and 20000 samples is about 0.001 for both.
    assert float(torch.stack(alone).mean()) < 0.485 < 0.495 < result.value < 0.505


def test_u_lira_tells_models_apart() -> None:
    result = u_lira(draw(8, 50, 100.0, 1), draw(8, 50, 0.0, 2))
    assert result.accuracy.value == result.auc.value == result.tpr_at_1_percent.value == 1.0


def test_u_lira_without_enough_models() -> None:
    models = draw(3, 4)
    for value, reason in (
        (u_lira(models[:2], models), "2 unlearned models are too few, at least 3 are needed"),
        (u_lira(models, models[:0]), "0 retrained models are too few, at least 3 are needed"),
        (u_lira(models[:, :0], models[:, :0]), "no sample was seen"),
        (
            u_lira(models, models.where(models < 2, math.inf)),
            f"{int((models >= 2).sum())} log-odds of retrained models",
        ),
    ):
        for estimate in value[:4]:
            assert estimate.reason is not None and estimate.reason.startswith(reason)


def klom_of_one(unlearned: Any, retrained: Any, bins: int = 20, clip: float = 100, eps: float = 1e-5) -> float:
    """numpy's histogram counts the highest margin in the last bin."""
    ours, theirs = (np.clip(margins, -clip, clip) for margins in (unlearned, retrained))
    low, high = min(ours.min(), theirs.min()), max(ours.max(), theirs.max())
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    p, q = (np.histogram(margins, edges)[0] / len(margins) for margins in (ours, theirs))
    return float(entropy(p, np.where(p > 0, np.maximum(q, eps), q)))  # scipy makes both sum to 1


@pytest.mark.parametrize(("models", "others"), [(1, 1), (16, 16), (30, 12)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 80.0])
def test_klom_against_numpy(models: int, others: int, scale: float) -> None:
    unlearned, retrained = scale * draw(models, 40, 0.5, 1), scale * draw(others, 40, 0.0, 2)
    result = klom(unlearned, retrained)
    expected = [klom_of_one(unlearned[:, x].numpy(), retrained[:, x].numpy()) for x in range(40)]
    assert result.per_sample.tolist() == pytest.approx(expected, abs=1e-9)
    assert result.mean.value == pytest.approx(np.mean(expected), abs=1e-9)
    for estimate, q in ((result.p95, 0.95), (result.p99, 0.99)):
        assert estimate.value == pytest.approx(np.quantile(expected, q), abs=1e-9)


def test_the_highest_margin_counts() -> None:
    """With `np.digitize`, as in the published code, it lies behind the last bin and is lost."""
    unlearned, retrained = np.array([0.0, 0.1, 10.0]), np.array([0.0, 0.1, 0.2])
    edges = np.linspace(0, 10, 21)
    naive = [np.bincount(np.digitize(m, edges) - 1, minlength=21)[:20] for m in (unlearned, retrained)]
    assert [int(counts.sum()) for counts in naive] == [2, 3]
    assert float(entropy(naive[0] / 2, naive[1] / 3)) == 0  # an outlier in every third model, and no difference
    ours = klom(torch.tensor(unlearned)[:, None], torch.tensor(retrained)[:, None]).mean.value
    assert ours == pytest.approx(klom_of_one(unlearned, retrained), abs=1e-9)
    assert ours > 2


def test_klom_of_equal_and_of_constant_margins() -> None:
    margins = draw(8, 5)
    assert klom(margins, margins).mean.value == klom(torch.ones(3, 2), torch.ones(4, 2)).mean.value == 0
    assert klom(torch.full((3, 2), 150.0), torch.full((4, 2), math.inf)).mean.value == 0  # both clipped


def test_klom_without_models() -> None:
    margins = draw(3, 4)
    broken = margins.clone()
    broken[0, 0] = math.nan
    for value, reason in (
        (klom(margins[:0], margins), "no unlearned model was given"),
        (klom(margins, broken), "1 margins of retrained models are NaN"),
        (klom(margins[:, :0], margins[:, :0]), "no sample was seen"),
    ):
        assert value.mean.reason == value.p95.reason == value.p99.reason == reason


def test_margins_are_log_odds() -> None:
    logits, labels = draw(20, 5), torch.arange(20) % 5
    others = logits.scatter(1, labels[:, None], -math.inf)
    margins = logits.gather(1, labels[:, None])[:, 0] - others.logsumexp(1)
    assert log_odds(logits, labels).tolist() == pytest.approx(margins.tolist(), abs=1e-9)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(HAMUValueError, match=r"Expected `out_scores` to be of shape \[M, 3\] with at least 2 models"):
        lira_scores(torch.ones(3), torch.ones(1, 3))
    with pytest.raises(HAMUValueError, match=r"Expected `in_scores` to be of shape \[M, 3\]"):
        lira_scores(torch.ones(3), torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(HAMUValueError, match=r"Expected `retrained` to be of shape \[M, 3\]"):
        klom(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(HAMUValueError, match="Expected `bins` to be at least 1"):
        klom(torch.ones(2, 3), torch.ones(2, 3), bins=0)
