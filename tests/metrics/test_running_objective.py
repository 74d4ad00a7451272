"""Weighted means, windows, NaN, and the reduction over processes."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics import RunningObjective
from tests.distributed import run_ranks


def updated(*losses: float) -> RunningObjective:
    objective = RunningObjective()
    for loss in losses:
        objective.update(torch.tensor(loss))
    return objective


def test_mean_over_samples_not_batches() -> None:
    objective = RunningObjective()
    objective.update(torch.tensor(1.0), batch_size=3)
    objective.update(torch.tensor(5.0), batch_size=torch.tensor(1))
    assert objective.compute() == (2.0, 0.0)


def test_change_counts_from_the_first_window() -> None:
    objective = updated(1.0, 3.0)
    assert objective.compute().change == 0
    assert objective.close_window() == 2
    objective.update(torch.tensor(5.0))
    assert objective.compute() == (5.0, 3.0)
    assert objective.close_window() == 5
    objective.update(torch.tensor(1.0))
    assert objective.compute() == (1.0, -1.0)
    assert objective.start == 2 and objective.latest == 5


def test_an_empty_window_is_not_counted() -> None:
    objective = RunningObjective()
    assert objective.close_window().isnan()
    assert objective.start is None and objective.latest is None
    objective.update(torch.tensor(2.0))
    objective.close_window()
    assert objective.close_window().isnan()
    assert objective.start == 2 and objective.latest == 2


def test_explicit_start() -> None:
    objective = RunningObjective(start=1.5)
    objective.update(torch.tensor(2.0))
    assert objective.compute() == (2.0, 0.5)
    objective.close_window()
    assert objective.start == 1.5 and objective.latest == 2


def test_a_nan_start_is_not_replaced() -> None:
    objective = updated(math.nan)
    objective.close_window()
    objective.update(torch.tensor(2.0))
    assert objective.compute().loss == 2 and objective.compute().change.isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_wide(dtype: torch.dtype) -> None:
    """3.0 times 30000 tokens is above the largest float16."""
    objective = RunningObjective()
    objective.update(torch.tensor(3.0, dtype=dtype), batch_size=30000)
    assert objective.compute().loss == 3.0


def test_a_loss_of_shape_one() -> None:
    objective = RunningObjective()
    objective.update(torch.tensor([2.0]))
    assert objective.compute().loss.shape == ()


def test_a_vector_of_losses_is_refused() -> None:
    with pytest.raises(HAMUValueError, match=r"Expected `loss` to be one number, but got shape \[2\]"):
        RunningObjective().update(torch.ones(2))


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [(0, "at least 1, but"), (-1, "at least 1, but"), (torch.tensor(1.5), "a .*whole number")],
)
def test_bad_batch_sizes(batch_size: int | torch.Tensor, expected: str) -> None:
    with pytest.raises(HAMUValueError, match=f"Expected `batch_size` to be {expected}"):
        RunningObjective().update(torch.tensor(1.0), batch_size)


def test_closing_a_window_reads_nothing_on_the_host() -> None:
    objective = RunningObjective().to("meta")
    objective.update(torch.empty((), device="meta"))
    assert objective.close_window().is_meta


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_is_not_hidden(bad: float) -> None:
    objective = updated(1.0)
    objective.close_window()
    for loss in (1.0, bad, 1.0):
        objective.update(torch.tensor(loss))
    value = objective.compute()
    assert not value.loss.isfinite() and not value.change.isfinite()
    objective.close_window()
    objective.update(torch.tensor(4.0))
    assert objective.compute() == (4.0, 3.0)


def test_reset_ends_the_window_and_keeps_the_start() -> None:
    objective = updated(1.0)
    objective.close_window()
    objective.update(torch.tensor(100.0))
    objective.reset()
    objective.update(torch.tensor(3.0))
    assert objective.compute() == (3.0, 2.0)


def test_graphs_are_not_kept() -> None:
    objective = RunningObjective()
    objective.update(torch.tensor(1.0, requires_grad=True) * 2)
    assert not objective.total.requires_grad


def test_nothing_is_read_on_the_host() -> None:
    """A tensor on the meta device has no value to read."""
    objective = RunningObjective().to("meta")
    objective.update(torch.empty((), device="meta"), batch_size=4)
    assert objective.total.is_meta


def test_copies_are_independent() -> None:
    objective = updated(1.0)
    objective.close_window()
    objective.update(torch.tensor(2.0))
    for copy in (objective.clone(), pickle.loads(pickle.dumps(objective))):
        copy.update(torch.tensor(6.0))
        assert copy.compute() == (4.0, 3.0)
    assert objective.compute() == (2.0, 1.0)


def compute_on_rank(rank: int) -> tuple[float, ...]:
    objective = RunningObjective()
    for loss in ([1.0, 2.0, 3.0], [10.0])[rank]:
        objective.update(torch.tensor(loss), batch_size=2)
    start = float(objective.close_window())
    objective.update(torch.tensor(float(rank)))
    return start, *map(float, objective.compute())


def test_sums_are_reduced_over_processes() -> None:
    """Ranks with different numbers of batches; the mean of their means would be 6."""
    assert run_ranks(compute_on_rank, 2) == [(4.0, 0.5, -3.5)] * 2


def start_with_one_rank(rank: int) -> tuple[float, ...]:
    objective = RunningObjective()
    if rank == 0:
        objective.update(torch.tensor(2.0))
    objective.close_window()
    objective.update(torch.tensor(5.0))
    assert objective.start is not None
    return float(objective.start), *map(float, objective.compute())


def test_a_rank_without_a_batch_has_the_same_start() -> None:
    assert run_ranks(start_with_one_rank, 2) == [(2.0, 5.0, 3.0)] * 2
