"""The likelihood-ratio attack with given shadow models, batch by batch."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from hamu_lightning.checks import check_choice
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics._membership import as_flags
from hamu_lightning.metrics._samples import SampleMetric
from hamu_lightning.metrics.functional import Estimate, as_numbers, auc, lira_scores, tpr_at_fpr, undefined

LiRANumber = Literal["auc", "tpr_at_0_1_percent", "tpr_at_1_percent"]
_RATES = {"tpr_at_0_1_percent": 0.001, "tpr_at_1_percent": 0.01}


class LiRA(SampleMetric):
    """How well a likelihood ratio under shadow models tells members from others; see `functional.lira_scores`.

    Ideal 0.5 for the AUC; 0.001 and 0.01 for the shares found at these shares of false alarms.

    Args:
        of: The one number that `compute` returns: "auc", "tpr_at_0_1_percent" or "tpr_at_1_percent".
        spread: "sample" or "all", as for `functional.lira_scores`.
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If an argument is none of its choices.

    Example:
        >>> metric = LiRA()
        >>> out = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
        >>> metric.update(torch.tensor([3.0, 0.0]), out, torch.tensor([True, False]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    counts: Tensor

    def __init__(self, of: LiRANumber = "auc", *, spread: Literal["sample", "all"] = "sample", **options: Any) -> None:
        super().__init__(**options)
        check_choice("of", of, get_args(LiRANumber))
        check_choice("spread", spread, ("sample", "all"))
        self.of, self.spread = of, spread
        self.ideal = _RATES.get(of, 0.5)
        # A process without samples learns from the others how many models of each kind there are.
        self.add_state("counts", torch.zeros(2, dtype=torch.long), dist_reduce_fx="max")
        self._known: tuple[int, int] | None = None

    @override
    def update(
        self, scores: Any, out_scores: Any, is_member: Tensor | bool, in_scores: Any = None, ids: Any = None
    ) -> None:
        """Add some samples. Nothing is read on the host.

        Args:
            scores: `[n]`, log-odds of the label by the model under attack, see `functional.log_odds`.
            out_scores: `[M, n]`, by shadow models that were not trained on the samples.
            is_member: boolean `[n]`, True for samples to forget and False for held-out ones, or one bool for all.
            in_scores: `[M', n]`, by shadow models that were trained on them; None for the offline attack.
            ids: integer `[n]`, the number of each sample in its own data set.

        Raises:
            HAMUValueError: If the shapes are others, the numbers of models not those of the first call or below 2, or
                `ids` no integers.
        """
        phi, outside = as_numbers("scores", scores, self.device), as_numbers("out_scores", out_scores, self.device)
        inside = as_numbers("in_scores", in_scores if in_scores is not None else outside[:0], self.device)
        members = as_flags(is_member, phi)
        counts = _count(phi, outside, inside, self._known)
        self._known, self.counts = counts, torch.tensor(counts, device=self.device)
        columns = (members.to(phi.dtype)[None], phi[None], outside.to(phi), inside.to(phi))
        self._add(torch.cat(columns).T, ids)

    @override
    def _summarise(self) -> Estimate:
        out, inside = self.counts.tolist()
        rows = self._rows(2 + out + inside, by=0)
        if not out:
            return undefined("no sample was seen", (0, 0), self.ideal)
        is_member, shadows = rows[:, 0] > 0, rows[:, 2:].T
        found = lira_scores(rows[:, 1], shadows[:out], shadows[out:] if inside else None, spread=self.spread)
        sides = found[is_member], found[~is_member]
        return auc(*sides) if self.of == "auc" else tpr_at_fpr(*sides, _RATES[self.of])


def _count(phi: Tensor, outside: Tensor, inside: Tensor, known: tuple[int, int] | None) -> tuple[int, int]:
    """How many shadow models there are of each kind.

    Raises:
        HAMUValueError: If the shapes do not fit.
    """
    is_wrong = any(x.ndim != 2 or x.shape[1:] != phi.shape for x in (outside, inside))
    counts = (len(outside), len(inside))
    if phi.ndim != 1 or is_wrong or counts[0] < 2 or counts[1] == 1:
        raise HAMUValueError(
            f"Expected `scores` to be of shape [n], and `out_scores` and `in_scores` [M, n] with at least 2 models, "
            f"but got {list(phi.shape)}, {list(outside.shape)} and {list(inside.shape)}. Give one number per model and "
            "sample."
        )
    if known not in (None, counts):
        raise HAMUValueError(
            f"Expected the shadow models to be as many as before, {known}, but got {counts}. "
            "Give the numbers of all models on the same samples in one call."
        )
    return counts
