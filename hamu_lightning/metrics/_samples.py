"""Metrics that keep numbers of each sample: gathered over processes, each sample once, whatever a sampler pads with."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from hamu_lightning.checks import check_count
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import widest_float
from hamu_lightning.metrics._base import HAMUMetric
from hamu_lightning.metrics.functional import Estimate, as_numbers


class CollectingMetric(HAMUMetric):
    """A metric that rests on numbers of single samples, with an interval and, where there is no number, a reason."""

    ideal: float | None = None
    """What a model without the forgotten data would have; None where only that model's own number says it."""
    reason: str | None
    """Why the last number was NaN; None if it was not."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.reason = None

    @property
    @override
    def dtype(self) -> torch.dtype:
        """The dtype of all states, booleans too.

        torchmetrics lets a process without samples send an empty tensor of this dtype, and a collective of two dtypes
        is undefined. Its own `dtype` falls back to float32 at each move to a device.
        """
        return widest_float(self.device)

    @override
    def compute(self) -> Tensor:
        """Return the number, 0-d; NaN with a `reason` where it is not defined."""
        return torch.tensor(self._measure().value, dtype=self.dtype, device=self.device)

    def estimate(self) -> Estimate:
        """Return the number with its interval, the number of samples, the ideal, and the reason of a NaN.

        It is gathered from all processes: call it on all of them.
        """
        should_sync = self._to_sync and not self._is_synced
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=should_sync, should_unsync=self._should_unsync
        ):
            return self._measure()

    @override
    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self.reason = None

    def _measure(self) -> Estimate:
        estimate = self._summarise()
        self.reason = estimate.reason
        return estimate

    @abstractmethod
    def _summarise(self) -> Estimate:
        """The estimate from the states as they are."""


class SampleMetric(CollectingMetric):
    """A metric of one row of numbers per sample.

    Across processes the rows are concatenated. A sampler that pads with duplicates (`DistributedSampler`) counts them
    twice, unless `ids` are given: of samples with the same id the first is kept.
    """

    values: list[Tensor] | Tensor
    ids: list[Tensor] | Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Flat: what a process without samples sends has one dimension.
        self.add_state("values", [], dist_reduce_fx="cat")
        self.add_state("ids", [], dist_reduce_fx="cat")

    def _add(self, rows: Tensor, ids: Any) -> None:
        """Keep `[n, width]` numbers."""
        assert isinstance(self.values, list) and isinstance(self.ids, list)
        dtype = widest_float(rows.device)
        self.ids.append(as_ids(ids, rows[:, 0]).to(dtype))
        self.values.append(rows.detach().to(dtype).reshape(-1))

    def _rows(self, width: int, by: int | None = None) -> Tensor:
        """All rows, `[N, width]`, each sample once; where a column says the data set, once in each."""
        if isinstance(self.ids, list) and not self.ids:
            return torch.zeros(0, width, dtype=self.dtype, device=self.device)
        ids, values = dim_zero_cat(self.ids), dim_zero_cat(self.values)
        rows = values.view(len(ids), -1)
        return rows[find_first(ids, None if by is None else rows[:, by])]


def as_ids(ids: Any, like: Tensor) -> Tensor:
    """The numbers of samples in their data set as floats `[N]`, NaN where there are none.

    Raises:
        HAMUValueError: If they are not integers, one per sample.
    """
    if ids is None:
        return torch.full_like(like, torch.nan, dtype=widest_float(like.device))
    if isinstance(ids, list):
        ids = torch.tensor([check_count("ids", i, least=-(2**53), most=2**53) for i in ids])
    if not isinstance(ids, Tensor):
        ids = as_numbers("ids", ids, like.device)
    if ids.shape != like.shape or ids.is_floating_point():
        raise HAMUValueError(
            f"Expected `ids` to be integers of shape {list(like.shape)}, but got {ids.dtype} of shape "
            f"{list(ids.shape)}. Give the index of each sample in its data set."
        )
    numbers: Tensor = ids.to(like.device, widest_float(like.device))
    return numbers


def find_first(ids: Tensor, classes: Tensor | None = None) -> Tensor:
    """Index of the first sample of each class and id, in the order of the samples; one without an id repeats none."""
    order = ids.sort(stable=True).indices
    if classes is not None:
        order = order[classes[order].sort(stable=True).indices]
    # A difference with NaN is not 0.
    is_repeat = torch.zeros_like(order, dtype=torch.bool)
    is_repeat[1:] = ids[order].diff() == 0
    if classes is not None:
        is_repeat[1:] &= classes[order].diff() == 0
    return order[~is_repeat].sort().values
