"""The AUC against scikit-learn, the cases without one, its interval, and the reduction over processes."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics import Interval, MembershipAUC
from tests.distributed import run_ranks


def updated(losses: Tensor, is_member: Tensor, batch: int = 7) -> MembershipAUC:
    auc = MembershipAUC()
    for part, members in zip(losses.split(batch), is_member.split(batch), strict=True):
        auc.update(part, members)
    return auc


def oracle(losses: Tensor, is_member: Tensor) -> float:
    """A member is expected to have the lower loss, so the score of the attack is the negated loss."""
    return float(roc_auc_score(is_member.numpy(), -losses.double().numpy()))


def sample(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Losses of 20 to 50, members lower on average: a sigmoid maps all of them to 1."""
    generator = torch.Generator().manual_seed(seed)
    is_member = torch.rand(n, generator=generator) < 0.4
    losses = 20 + 30 * torch.rand(n, generator=generator, dtype=torch.float64)
    return losses - 4.0 * is_member, is_member


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_losses_of_any_range(batch: int) -> None:
    losses, is_member = sample(300)
    # scikit-learn integrates float64 trapezes.
    assert float(updated(losses, is_member, batch).compute()) == pytest.approx(oracle(losses, is_member), abs=1e-12)


def test_batches_of_different_range() -> None:
    """One batch in [0, 1] and one outside: an implementation that squashes batch by batch mixes two scales."""
    losses = torch.tensor([0.9, 0.2, 0.8, 0.1, 1.5, 0.85, 3.0, 0.3])
    is_member = torch.tensor([False, True, True, False, True, False, False, True])
    assert float(updated(losses, is_member, 4).compute()) == pytest.approx(oracle(losses, is_member), abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_ties(pairs: list[tuple[int, bool]]) -> None:
    losses, is_member = torch.tensor([float(x) for x, _ in pairs]), torch.tensor([m for _, m in pairs])
    auc = updated(losses, is_member)
    value = float(auc.compute())
    if is_member.all() or not is_member.any():
        assert math.isnan(value) and auc.reason is not None
    else:
        assert value == pytest.approx(oracle(losses, is_member), abs=1e-12) and auc.reason is None


def test_known_values() -> None:
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0, math.inf])
    for forget, holdout, expected in ((low, high, 1.0), (high, low, 0.0), (high, high, 0.5)):
        auc = MembershipAUC()
        auc.update(forget, True)
        auc.update(holdout, False)
        assert auc.compute() == expected


def test_only_the_order_counts() -> None:
    losses, is_member = sample(200)
    reference = updated(losses, is_member).compute()
    for other in (losses * 1e-30, losses.exp(), losses - 1e6):
        assert updated(other, is_member).compute() == reference


def test_float64_losses_are_not_rounded() -> None:
    auc = MembershipAUC().to("cpu")  # torchmetrics resets its dtype at each move
    auc.update(torch.tensor([1.0], dtype=torch.float64), True)
    auc.update(torch.tensor([1.0 + 1e-12], dtype=torch.float64), False)
    assert auc.compute() == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_losses(dtype: torch.dtype) -> None:
    losses, is_member = sample(100)
    losses = losses.to(dtype)
    assert float(updated(losses, is_member).compute()) == pytest.approx(oracle(losses, is_member), abs=1e-12)


@pytest.mark.parametrize(("is_member", "missing"), [(True, "held-out"), (False, "forget")])
def test_one_class(is_member: bool, missing: str) -> None:
    auc = MembershipAUC()
    auc.update(torch.tensor([1.0, 2.0]), is_member)
    assert auc.compute().isnan()
    assert auc.reason == f"no {missing} sample was seen"
    assert all(limit.isnan() for limit in auc.interval())
    auc.update(torch.tensor([3.0]), not is_member)
    assert not auc.compute().isnan() and auc.reason is None


def test_no_sample() -> None:
    auc = MembershipAUC()
    with pytest.warns(UserWarning, match="was called before the ``update``"):
        assert auc.compute().isnan()
    assert auc.reason == "no sample was seen"
    auc.update(torch.zeros(0), True)
    assert auc.compute().isnan() and auc.reason == "no sample was seen"


@pytest.mark.parametrize(("is_member", "name"), [(True, "forget"), (False, "held-out")])
def test_nan_losses(is_member: bool, name: str) -> None:
    auc = MembershipAUC()
    auc.update(torch.tensor([1.0, math.nan, 2.0]), is_member)
    auc.update(torch.tensor([1.0, 3.0]), not is_member)
    assert auc.compute().isnan()
    assert auc.reason == f"1 of 3 losses of {name} samples are NaN"
    lower, upper = auc.interval()
    assert lower.isnan() and upper.isnan()


def test_reset() -> None:
    auc = MembershipAUC()
    auc.update(torch.tensor([math.nan]), True)
    auc.update(torch.tensor([1.0]), False)
    auc.compute()
    auc.reset()
    assert auc.reason is None
    auc.update(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
    assert auc.compute() == 1.0


def test_copies_are_independent() -> None:
    losses, is_member = sample(50)
    auc = updated(losses, is_member)
    for copy in (auc.clone(), pickle.loads(pickle.dumps(auc))):
        copy.update(torch.full((50,), 100.0), True)
        assert copy.compute() < auc.compute()
    assert auc.compute() == updated(losses, is_member).compute()


def test_forward_returns_the_value_of_the_batch() -> None:
    auc = MembershipAUC()
    assert auc(torch.tensor([1.0, 2.0]), torch.tensor([True, False])) == 1.0
    assert auc(torch.tensor([2.0, 1.0]), torch.tensor([True, False])) == 0.0
    assert auc.compute() == 0.5
    assert auc(torch.tensor([2.0]), True).isnan() and auc.reason is not None
    assert not auc.compute().isnan() and auc.reason is None


def test_losses_are_detached() -> None:
    auc = MembershipAUC()
    auc.update(torch.tensor([1.0], requires_grad=True), True)
    assert isinstance(auc.losses, list) and not auc.losses[0].requires_grad


def test_the_mean_loss_is_refused() -> None:
    with pytest.raises(HAMUValueError, match=r"Expected `losses` to be of shape \[N\], but got \[\]"):
        MembershipAUC().update(torch.tensor(1.0), True)


@pytest.mark.parametrize("is_member", [torch.ones(3, dtype=torch.bool), torch.ones(2), torch.ones(2, dtype=torch.long)])
def test_other_labels_are_refused(is_member: Tensor) -> None:
    with pytest.raises(HAMUValueError, match="Expected `is_member` to be boolean, of shape"):
        MembershipAUC().update(torch.zeros(2), is_member)


def test_samples_with_the_same_id_count_once() -> None:
    losses, is_member = sample(40)
    ids = torch.arange(40) % 20  # both classes use the same numbers: an id counts within its class
    keys = list(zip(is_member.tolist(), ids.tolist(), strict=True))
    first = torch.tensor([key not in keys[:k] for k, key in enumerate(keys)])
    auc = MembershipAUC()
    auc.update(losses[:25], is_member[:25], ids[:25])
    auc.update(losses[25:], is_member[25:], ids[25:])
    assert 20 < first.sum() < 40
    assert auc.compute() == updated(losses[first], is_member[first]).compute() != updated(losses, is_member).compute()


def test_an_id_counts_within_its_class() -> None:
    auc = MembershipAUC()
    auc.update(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), torch.tensor([5, 5]))
    assert auc.compute() == 1.0


def test_samples_without_ids_are_all_kept() -> None:
    losses, is_member = sample(40)
    losses, is_member = torch.cat([losses, losses[:7]]), torch.cat([is_member, is_member[:7]])
    # Both count pairs exactly; sklearn sums the areas of trapezia in float64.
    expected = pytest.approx(roc_auc_score(is_member.numpy(), -losses.numpy()), rel=1e-12)
    assert float(updated(losses, is_member).compute()) == expected


@pytest.mark.parametrize("ids", [torch.zeros(3, dtype=torch.long), torch.zeros(2)])
def test_other_ids_are_refused(ids: Tensor) -> None:
    with pytest.raises(HAMUValueError, match="Expected `ids` to be integers of shape"):
        MembershipAUC().update(torch.zeros(2), True, ids)


def compute_padded(rank: int) -> list[float]:
    """Seven samples on two ranks: the eighth repeats the first. Without ids, and with them."""
    losses, is_member = sample(7)
    index = torch.tensor([0, 2, 4, 6] if rank == 0 else [1, 3, 5, 0])
    values = []
    for ids in (None, index):
        auc = MembershipAUC()
        auc.update(losses[index], is_member[index], ids)
        values.append(float(auc.compute()))
    return values


def test_padding_of_a_distributed_sampler_counts_once() -> None:
    (naive, ours), other = run_ranks(compute_padded, 2)
    assert [naive, ours] == other
    assert naive != ours == float(updated(*sample(7)).compute())


def test_interval_agrees_with_a_plain_bootstrap() -> None:
    losses, is_member = sample(120)
    losses = losses.round()  # with ties
    auc = updated(losses, is_member)
    rng = np.random.default_rng(0)
    forget, holdout = losses[is_member].numpy(), losses[~is_member].numpy()
    truth = np.repeat([True, False], [len(forget), len(holdout)])
    draws = [
        roc_auc_score(truth, -np.concatenate([rng.choice(forget, len(forget)), rng.choice(holdout, len(holdout))]))
        for _ in range(1000)
    ]
    for confidence in (0.8, 0.95):
        lower, upper = auc.interval(confidence, samples=4000)
        tail = (1 - confidence) / 2
        # The standard error of the 2.5 % quantile of 1000 draws is about 0.085 of their standard deviation
        # (sqrt(p (1 - p) / 1000) over the normal density there); four of them, and our own error beside it.
        tolerance = 0.4 * float(np.std(draws))
        assert float(lower) == pytest.approx(np.quantile(draws, tail), abs=tolerance)
        assert float(upper) == pytest.approx(np.quantile(draws, 1 - tail), abs=tolerance)
        assert lower < auc.compute() < upper


def test_interval_covers_the_true_value() -> None:
    """Members have the loss distribution of the others, so the true AUC is 0.5."""
    covered = 0
    for seed in range(200):
        losses = torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        lower, upper = updated(losses, torch.arange(60) < 30).interval(0.9, samples=200)
        covered += bool(lower <= 0.5 <= upper)
    # 180 expected, less some 3 % for the known narrowness at 30 samples a class; standard deviation 4.2, four of them.
    assert 157 <= covered <= 197


def test_interval_draws_do_not_depend_on_the_piece_size_in_law(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, is_member = sample(120)
    auc = updated(losses, is_member)
    whole = auc.interval(samples=4000)
    monkeypatch.setattr("hamu_lightning.metrics.functional._ranks._PIECE", 1000)
    pieces = auc.interval(samples=4000)
    width = float(whole.upper - whole.lower)
    # The standard error of a 2.5 % quantile of 4000 draws is 0.011 of the width; six of them for a difference.
    assert float(pieces.lower) == pytest.approx(float(whole.lower), abs=0.07 * width)
    assert float(pieces.upper) == pytest.approx(float(whole.upper), abs=0.07 * width)


def test_interval_is_seeded_and_leaves_the_global_state_alone() -> None:
    auc = updated(*sample(80))
    state = torch.get_rng_state()
    assert auc.interval(seed=3) == auc.interval(seed=3) != auc.interval(seed=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_interval_of_separated_classes_has_no_width() -> None:
    auc = updated(torch.arange(20.0), torch.arange(20) < 10)
    assert auc.compute() == 1.0 and tuple(map(float, auc.interval())) == (1.0, 1.0)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_bad_confidence(confidence: float) -> None:
    with pytest.raises(HAMUValueError, match="Expected `confidence` to be between 0 and 1"):
        updated(*sample(20)).interval(confidence)


def test_bad_number_of_samples() -> None:
    with pytest.raises(HAMUValueError, match="Expected `samples` to be at least 1, but got 0"):
        updated(*sample(20)).interval(samples=0)


def compute_on_rank(rank: int, cases: list[list[list[int]]]) -> list[tuple[float, Interval, int, Interval]]:
    return [compute_case(case[rank]) for case in cases]


def compute_case(share: list[int]) -> tuple[float, Interval, int, Interval]:
    losses, is_member = sample(60)
    auc = MembershipAUC().to("cpu")  # torchmetrics resets its dtype at each move
    for start in share:
        auc.update(losses[start : start + 20], is_member[start : start + 20])
    limits, value = auc.interval(samples=100), float(auc.compute())
    # The rank's own samples are back after the exchange.
    return value, limits, len(auc.losses), auc.interval(samples=100)


def test_samples_are_gathered_over_processes() -> None:
    """Ranks with different numbers of samples, and one with none."""
    cases = [[[0, 20], [40]], [[0, 20, 40], []]]
    auc = updated(*sample(60))
    for rank, results in enumerate(run_ranks(compute_on_rank, 2, cases)):
        for case, (value, limits, n_updates, again) in zip(cases, results, strict=True):
            assert value == float(auc.compute())
            assert limits == again == auc.interval(samples=100)
            # torchmetrics joins the batches of a rank before it sends them.
            assert n_updates <= len(case[rank]) and (n_updates > 0) == (len(case[rank]) > 0)
