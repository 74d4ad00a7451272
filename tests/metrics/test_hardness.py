"""Means over steps against plain loops, undefined cases, and the reduction over processes."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torchmetrics import MetricCollection

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import compute_gramian
from hamu_lightning.metrics import Hardness, MembershipAUC, RunningObjective
from hamu_lightning.metrics._base import HAMUMetric
from tests.distributed import run_ranks


def make_gramian(seed: int, blocks: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    retain, forget = ([torch.randn(4, generator=generator) for _ in range(blocks)] for _ in range(2))
    retain[0].zero_()  # one block without a retain gradient
    return compute_gramian(retain, forget)


def gramian_of(rr: float, rf: float, ff: float) -> Tensor:
    return torch.tensor([[[rr, rf], [rf, ff]]], dtype=torch.float64)


def expected_value(gramians: list[Tensor]) -> list[float]:
    kappas, cosines, signs = [], [], []
    for gramian in gramians:
        rr, rf, ff = (sum(float(g[i, j]) for g in gramian) for i, j in ((0, 0), (0, 1), (1, 1)))
        kappas.append(rf)
        cosines.append(rf / math.sqrt(rr * ff))
        signs += [float(g[0, 1]) > 0 for g in gramian if g[0, 0] > 0 and g[1, 1] > 0]
    return [sum(x) / len(x) for x in (kappas, cosines, signs)]


def updated(gramians: list[Tensor]) -> Hardness:
    hardness = Hardness()
    for gramian in gramians:
        hardness.update(gramian)
    return hardness


def test_means_over_updates() -> None:
    gramians = [make_gramian(seed) for seed in range(6)]
    # Sums of thirty float64 numbers in another order.
    assert list(map(float, updated(gramians).compute())) == pytest.approx(expected_value(gramians), rel=1e-12)


def test_gramian_of_float32() -> None:
    gramians = [make_gramian(seed).float() for seed in range(3)]
    value = updated(gramians).compute()
    assert all(number.dtype == torch.float64 for number in value)
    assert list(map(float, value)) == pytest.approx(expected_value(gramians), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-280, 1.0, 1e280])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cosine_stays_in_range(scale: float, sign: float) -> None:
    """Collinear gradients, whose product of squared norms leaves the range of float64, and whose rf is rounded up."""
    value = updated([gramian_of(scale, sign * scale * (1 + 1e-15), scale)]).compute()
    assert float(value.cosine) == sign
    assert float(value.conflicting) == (sign > 0)


def test_steps_with_a_zero_gradient_have_no_angle() -> None:
    value = updated([gramian_of(4, 2, 4), gramian_of(0, 0, 1), gramian_of(1, 0, 0)]).compute()
    assert float(value.kappa) == pytest.approx(2 / 3)
    assert value.cosine == 0.5 and value.conflicting == 1.0


def test_right_angle_is_no_conflict() -> None:
    assert updated([gramian_of(1, 0, 1), gramian_of(1, 0.5, 1)]).compute().conflicting == 0.5


def test_nan_where_nothing_was_seen() -> None:
    with pytest.warns(UserWarning, match="was called before the ``update``"):
        assert all(number.isnan() for number in Hardness().compute())
    value = updated([gramian_of(0, 0, 1)]).compute()
    assert value.kappa == 0 and value.cosine.isnan() and value.conflicting.isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("entry", [(0, 0), (0, 1), (1, 1)])
def test_non_finite_gramian_is_not_hidden(bad: float, entry: tuple[int, int]) -> None:
    gramian = make_gramian(0)
    gramian[2, entry[0], entry[1]] = bad
    hardness = updated([make_gramian(1), gramian, make_gramian(2)])
    assert all(number.isnan() for number in hardness.compute())
    hardness.reset()
    hardness.update(make_gramian(1))
    assert not any(number.isnan() for number in hardness.compute())


def test_counts_are_whole_numbers() -> None:
    """A float32 counter stops at 2^24 blocks, which a long run with many blocks passes."""
    hardness = updated([make_gramian(0)])
    for name in ("steps", "angles", "blocks", "conflicts"):
        assert getattr(hardness, name).dtype == torch.long


def test_nothing_is_read_on_the_host() -> None:
    """A tensor on the meta device has no value to read."""
    hardness = Hardness().to("meta")
    hardness.update(torch.empty(3, 2, 2, device="meta"))
    assert hardness.kappa_sum.is_meta


def test_low_precision_modules_do_not_round_the_sums() -> None:
    module = torch.nn.ModuleList([Hardness()]).to(torch.bfloat16)
    hardness = module[0]
    assert isinstance(hardness, Hardness)
    for _ in range(1000):
        hardness.update(gramian_of(1, 0.25, 1))
    assert hardness.compute().kappa == 0.25  # bfloat16 would stop adding at 64


def test_gradients_are_not_kept() -> None:
    """`forward` keeps graphs where `update` does not."""
    assert not Hardness()(gramian_of(1, 0.5, 1).requires_grad_()).kappa.requires_grad


@pytest.mark.parametrize("shape", [(2, 2), (1, 3, 3), (1, 2), (1, 1, 2, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(HAMUValueError, match=r"Expected `gramian` to be of shape \[B, 2, 2\]"):
        Hardness().update(torch.zeros(shape))


def test_copies_are_independent() -> None:
    hardness = updated([make_gramian(0)])
    for copy in (hardness.clone(), pickle.loads(pickle.dumps(hardness))):
        copy.update(make_gramian(1))
        assert copy.compute() == updated([make_gramian(0), make_gramian(1)]).compute()
    assert hardness.compute() == updated([make_gramian(0)]).compute()


def test_forward_returns_the_value_of_the_batch() -> None:
    hardness = updated([make_gramian(0)])
    assert hardness(make_gramian(1)) == updated([make_gramian(1)]).compute()
    # Two sums in another order.
    torch.testing.assert_close(
        hardness.compute(), updated([make_gramian(0), make_gramian(1)]).compute(), rtol=1e-12, atol=0
    )


def compute_on_rank(rank: int, cases: list[list[list[int]]]) -> list[list[float]]:
    return [[float(number) for number in updated([make_gramian(s) for s in case[rank]]).compute()] for case in cases]


def test_sums_are_reduced_over_processes() -> None:
    """Ranks with different numbers of updates (a mean of means would be another number), and one with none."""
    cases = [[[0, 1, 2, 3], [4]], [[0, 1], []]]
    of_ranks = run_ranks(compute_on_rank, 2, cases)
    assert of_ranks[0] == of_ranks[1]
    for case, value in zip(cases, of_ranks[0], strict=True):
        expected = expected_value([make_gramian(seed) for share in case for seed in share])
        assert value == pytest.approx(expected, rel=1e-12)  # sums in another order


@pytest.mark.parametrize("kind", [Hardness, MembershipAUC, RunningObjective])
@pytest.mark.parametrize("option", ["sync_on_compute", "dist_sync_on_step", "compute_on_cpu", "compute_with_cache"])
def test_torchmetrics_own_options_are_taken(kind: type[HAMUMetric], option: str) -> None:
    assert getattr(kind(**{option: True}), option) is True
    with pytest.raises(HAMUValueError, match=f"Expected options of torchmetrics.Metric, but .*: {option}=3"):
        kind(**{option: 3})
    with pytest.raises(HAMUValueError, match="Expected options of torchmetrics.Metric, but .*: nonsense=True"):
        kind(nonsense=True)


def test_metrics_draw_themselves() -> None:
    hardness, auc, running = Hardness(), MembershipAUC(), RunningObjective()
    hardness.update(torch.eye(2).expand(3, 2, 2))
    auc.update([0.1, 0.2, 0.9], np.array([True, False, False]))
    running.update(1.0)
    for metric, lines in ((hardness, 3), (auc, 1), (running, 2)):
        for value in (None, [metric.compute(), metric.compute()]):
            figure, axes = metric.plot(value)
            assert len(axes.get_lines()) == lines
            plt.close(figure)


def test_one_number_for_a_logger() -> None:
    for name in ("kappa", "cosine", "conflicting"):
        one, all_of_them = Hardness(of=name), Hardness()
        for metric in (one, all_of_them):
            metric.update(torch.tensor([[[1.0, 0.5], [0.5, 1.0]]]))
        assert torch.equal(one.compute(), getattr(all_of_them.compute(), name))
    found = MetricCollection({"a": Hardness(of="kappa"), "b": Hardness(of="cosine")})
    found.update(torch.tensor([[[4.0, 1.0], [1.0, 1.0]]]))
    assert {name: float(value) for name, value in found.compute().items()} == {"a": 1.0, "b": 0.5}
