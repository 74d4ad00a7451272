"""How well the loss alone tells forgotten samples from samples that the model has never seen."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from hamu_lightning.checks import check_choice, check_count, check_number, check_seed, describe
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import widest_float
from hamu_lightning.metrics._samples import CollectingMetric, as_ids, find_first
from hamu_lightning.metrics.functional import (
    Estimate,
    IntervalMethod,
    as_numbers,
    bootstrap_auc,
    membership_auc,
    undefined,
)


class Interval(NamedTuple):
    """The limits of a confidence interval, 0-d each."""

    lower: Tensor
    upper: Tensor


class LossAttack(CollectingMetric):
    """The AUC of an attack that says "was trained on" where a number of each sample is low."""

    ideal = 0.5
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    losses: list[Tensor] | Tensor
    members: list[Tensor] | Tensor
    ids: list[Tensor] | Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("losses", [], dist_reduce_fx="cat")
        self.add_state("members", [], dist_reduce_fx="cat")
        self.add_state("ids", [], dist_reduce_fx="cat")

    def _add_losses(self, losses: Tensor, is_member: Any, ids: Any) -> None:
        """Keep `[N]` numbers."""
        assert isinstance(self.losses, list) and isinstance(self.members, list) and isinstance(self.ids, list)
        dtype = widest_float(losses.device)
        members = as_flags(is_member, losses)
        self.ids.append(as_ids(ids, losses))
        self.losses.append(losses.to(dtype))
        self.members.append(members.to(dtype))

    @override
    def _summarise(self) -> Estimate:
        forget, holdout = self._split()
        if self.reason is not None:
            return undefined(self.reason, (forget.numel(), holdout.numel()), self.ideal)
        return membership_auc(forget, holdout)

    def _split(self) -> tuple[Tensor, Tensor]:
        """Return the losses of forget and held-out samples, and set `reason` if no AUC can be made of them."""
        if isinstance(self.losses, list) and not self.losses:
            losses = members = torch.zeros(0, device=self.device, dtype=self.dtype)
        else:
            losses, members = dim_zero_cat(self.losses), dim_zero_cat(self.members)
            kept = find_first(dim_zero_cat(self.ids), members)
            losses, members = losses[kept], members[kept]
        forget, holdout = losses[members > 0], losses[members == 0]
        self.reason = _find_reason(forget, holdout)
        return forget, holdout


class MembershipAUC(LossAttack):
    """Area under the ROC curve of a membership attack by loss, forget samples against held-out samples.

    The attack says "was trained on" where the loss is low (Yeom et al. 2018, https://arxiv.org/abs/1709.01604):

        AUC = P(loss(holdout) > loss(forget)) + 1/2 P(loss(holdout) = loss(forget)).

    1 means that forget samples look like members, 0 that they stand out as worse than unseen data. A model trained
    without the forget set lies near 0.5: compare with its AUC where there is one. Both sides are cause for alarm.

    Held-out data must be never trained on and of the distribution of the forget set: the retain set is no substitute.
    Evaluate both in `eval()` mode and with the same transforms. The AUC is exact, from ranks: the losses may have any
    range. Across processes the samples are concatenated. A sampler that pads with duplicates (`DistributedSampler`)
    counts them twice, unless `ids` are given: of samples of one class with the same id the first is kept.

    `compute` returns NaN, and the attribute `reason` says why, where a class is empty or a loss is NaN. `estimate`
    returns the AUC with DeLong's interval, `interval` that of a bootstrap.

    Args:
        **options: torchmetrics' own, such as `sync_on_compute`.

    Raises:
        HAMUValueError: If an option is unknown.

    Example:
        >>> auc = MembershipAUC()
        >>> auc.update(torch.tensor([0.1, 30.0]), is_member=True)
        >>> auc.update(torch.tensor([0.5, 30.0, 40.0, 0.1]), is_member=False)
        >>> auc.compute()
        tensor(0.6250, dtype=torch.float64)
    """

    @override
    def update(self, losses: Tensor, is_member: Tensor | bool, ids: Tensor | None = None) -> None:
        """Add the losses of some samples.

        Args:
            losses: `[N]`, one loss per sample, any unit: a tensor, an array or a list. Only their order matters.
            is_member: boolean `[N]`, True for samples of the forget set and False for held-out ones, or one bool for
                all of them.
            ids: integer `[N]`, the number of each sample in its own data set, below 2^53 (2^24 on a device without
                float64). Samples without ids are all kept.

        Raises:
            HAMUValueError: If the shapes differ from these, `is_member` is not boolean, or `ids` are not integers.
        """
        losses = as_numbers("losses", losses, self.device)
        if losses.ndim != 1:
            raise HAMUValueError(
                f"Expected `losses` to be of shape [N], but got {list(losses.shape)}. "
                "Give one loss per sample: compute it with `reduction='none'`, and average it over the tokens."
            )
        self._add_losses(losses, is_member, ids)

    def interval(
        self, confidence: float = 0.95, samples: int = 1000, seed: int = 0, *, method: IntervalMethod = "bootstrap"
    ) -> Interval:
        """Estimate how far the AUC could lie from its value by the choice of samples alone.

        Percentile interval of a stratified bootstrap: forget and held-out samples are drawn again with replacement,
        each class as often as it has samples. It does not cover the spread over trainings, and it is too narrow with
        few samples per class; where all pairs are in one order it has width 0. Call it on all processes. With
        `method="delong"` a normal interval without draws, which has a width there too; see `functional.auc`.

        Args:
            confidence: Probability to be covered, between 0 and 1.
            samples: Number of draws.
            seed: Seed of the draws; they leave the global random state alone.
            method: "bootstrap" or "delong".

        Returns:
            The limits, NaN where the AUC is.

        Raises:
            HAMUValueError: If `confidence` or `samples` is out of range, or `method` none of its choices.

        Example:
            >>> auc = MembershipAUC()
            >>> auc.update(torch.arange(40.0), is_member=torch.arange(40) % 3 == 0)
            >>> lower, upper = auc.interval()
            >>> bool(lower < auc.compute() < upper)
            True
        """
        confidence = check_number("confidence", confidence, above=0, below=1, cure="The usual choice is 0.95.")
        samples = check_count("samples", samples, cure="Give some 1000 for an interval of 95 %.")
        seed = check_seed(seed)
        check_choice("method", method, get_args(IntervalMethod))
        should_sync = self._to_sync and not self._is_synced
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=should_sync, should_unsync=self._should_unsync
        ):
            forget, holdout = self._split()
        if self.reason is not None:
            nan = torch.full((), torch.nan, dtype=forget.dtype, device=forget.device)
            return Interval(nan, nan.clone())
        if method == "delong":
            limits: Any = membership_auc(forget, holdout, confidence=confidence).interval
        else:
            tail = (1 - confidence) / 2
            # A member is expected to have the lower loss, so the score of the attack is the negated loss.
            aucs = 1 - bootstrap_auc(forget, holdout, samples, seed)
            limits = torch.quantile(aucs, torch.tensor([tail, 1 - tail], dtype=aucs.dtype)).tolist()
        lower, upper = torch.tensor(limits, device=forget.device, dtype=forget.dtype)
        return Interval(lower, upper)


def as_flags(is_member: Any, like: Tensor) -> Tensor:
    """Which of some samples are members, boolean `[N]`.

    Raises:
        HAMUValueError: If these are no booleans, or of another shape.
    """
    try:
        members = torch.as_tensor(is_member, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise HAMUValueError(
            f"Expected `is_member` to be True, False, or boolean of shape [N], but got {describe(is_member)}."
        ) from error
    if members.dtype != torch.bool or members.shape not in ((), like.shape):
        raise HAMUValueError(
            f"Expected `is_member` to be boolean, of shape [] or {list(like.shape)}, but got {members.dtype} "
            f"of shape {list(members.shape)}. Give True for samples of the forget set and False for held-out ones."
        )
    return members.expand_as(like)


def _find_reason(forget: Tensor, holdout: Tensor) -> str | None:
    if forget.numel() == 0 and holdout.numel() == 0:
        return "no sample was seen"
    for name, losses in (("forget", forget), ("held-out", holdout)):
        if losses.numel() == 0:
            return f"no {name} sample was seen"
        n_nan = int(losses.isnan().sum())
        if n_nan:
            return f"{n_nan} of {losses.numel()} losses of {name} samples are NaN"
    return None
