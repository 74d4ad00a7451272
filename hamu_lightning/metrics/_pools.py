"""Distances between many unlearned and many retrained models, batch by batch."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from hamu_lightning.checks import check_choice, check_count, check_number, check_positive
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics._samples import SampleMetric
from hamu_lightning.metrics.functional import Estimate, as_numbers, klom, u_lira

KLOMNumber = Literal["mean", "p95", "p99"]
ULiRANumber = Literal["accuracy", "auc", "tpr_at_0_1_percent", "tpr_at_1_percent"]


class PoolMetric(SampleMetric):
    """What these share: for each sample the log-odds of its label by all models of both kinds."""

    counts: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # A process without samples learns from the others how many models of each kind there are.
        self.add_state("counts", torch.zeros(2, dtype=torch.long), dist_reduce_fx="max")
        self._known: tuple[int, int] | None = None

    @override
    def update(self, unlearned: Any, retrained: Any, ids: Any = None) -> None:
        """Add some samples. Nothing is read on the host.

        Args:
            unlearned: `[M, n]`, log-odds of the label by all M unlearned models, see `functional.log_odds`.
            retrained: `[M', n]`, by all M' models that were trained without the forget set.
            ids: integer `[n]`, as for `JSToReference`.

        Raises:
            HAMUValueError: If the shapes are others, the numbers of models not those of the first call, or `ids` no
                integers.
        """
        ours, theirs = (
            as_numbers(name, given, self.device) for name, given in (("unlearned", unlearned), ("retrained", retrained))
        )
        if ours.ndim != 2 or theirs.ndim != 2 or ours.shape[1] != theirs.shape[1] or 0 in (len(ours), len(theirs)):
            raise HAMUValueError(
                f"Expected `unlearned` and `retrained` to be of shape [M, n] and [M', n], but got {list(ours.shape)} "
                f"and {list(theirs.shape)}. Give one number per model and sample."
            )
        counts = (len(ours), len(theirs))
        if self._known not in (None, counts):
            raise HAMUValueError(
                f"Expected the models to be as many as before, {self._known}, but got {counts}. "
                "Give the numbers of all models on the same samples in one call."
            )
        self._known = counts
        self.counts = torch.tensor(counts, device=self.device)
        self._add(torch.cat((ours, theirs.to(ours.device, ours.dtype))).T, ids)

    def _pools(self) -> tuple[Tensor, Tensor]:
        """`[M, N]` and `[M', N]`."""
        ours, theirs = self.counts.tolist()
        rows = self._rows(ours + theirs).T
        return rows[:ours], rows[ours:]


class KLOM(PoolMetric):
    """KL divergence of margins between unlearned and retrained models, nats; see `functional.klom`.

        KLOM(x) = KL(histogram of the unlearned models' margins || that of the retrained models')

    Ideal 0; in practice what two halves of the retrained models have.

    Args:
        of: The one number over samples that `compute` returns: "mean", or the quantile "p95" or "p99".
        bins: Number of bins.
        clip: Margins beyond `+-clip` count as that.
        eps: The least share of a bin.
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If an argument is out of range or none of its choices.

    Example:
        >>> metric = KLOM()
        >>> margins = torch.arange(8.0)[:, None]
        >>> metric.update(margins, margins)
        >>> metric.compute()
        tensor(0., dtype=torch.float64)
    """

    higher_is_better = False
    ideal = 0.0
    plot_lower_bound = 0.0

    def __init__(
        self, of: KLOMNumber = "mean", *, bins: int = 20, clip: float = 100.0, eps: float = 1e-5, **options: Any
    ) -> None:
        super().__init__(**options)
        check_choice("of", of, get_args(KLOMNumber))
        self.of, self.bins, self.clip = of, check_count("bins", bins), check_positive("clip", clip)
        self.eps = check_number("eps", eps, above=0, below=1)

    @override
    def _summarise(self) -> Estimate:
        result = klom(*self._pools(), bins=self.bins, clip=self.clip, eps=self.eps)
        return {"mean": result.mean, "p95": result.p95, "p99": result.p99}[self.of]


class ULiRA(PoolMetric):
    """Whether unlearned models can be told from models never trained on the samples; see `functional.u_lira`.

    Ideal 0.5 for accuracy and AUC; 0.001 and 0.01 for the shares found at these shares of false alarms.

    Args:
        of: The one number that `compute` returns: "accuracy", "auc", "tpr_at_0_1_percent" or "tpr_at_1_percent".
        spread: "sample" or "all", as for `functional.lira_scores`.
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If an argument is none of its choices.

    Example:
        >>> metric = ULiRA()
        >>> retrained = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> metric.update(retrained + 50.0, retrained)
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(
        self, of: ULiRANumber = "accuracy", *, spread: Literal["sample", "all"] = "sample", **options: Any
    ) -> None:
        super().__init__(**options)
        check_choice("of", of, get_args(ULiRANumber))
        check_choice("spread", spread, ("sample", "all"))
        self.of, self.spread = of, spread
        self.ideal = {"tpr_at_0_1_percent": 0.001, "tpr_at_1_percent": 0.01}.get(of, 0.5)

    @override
    def _summarise(self) -> Estimate:
        ours, theirs = self._pools()
        estimate: Estimate = getattr(u_lira(ours, theirs, spread=self.spread), self.of)
        return estimate
