"""How well the loss alone tells forgotten samples from samples that the model has never seen."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from hamu_lightning.checks import check_count, check_number, check_seed, describe
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.gramian import widest_float
from hamu_lightning.metrics._base import HAMUMetric, as_numbers

# Numbers held at once by the bootstrap: 32 MiB for each of its few tables, whatever the number of samples.
_PIECE = 2**22


class Interval(NamedTuple):
    """The limits of a confidence interval, 0-d each."""

    lower: Tensor
    upper: Tensor


class MembershipAUC(HAMUMetric):
    """Area under the ROC curve of a membership attack by loss, forget samples against held-out samples.

    The attack says "was trained on" where the loss is low (Yeom et al. 2018, https://arxiv.org/abs/1709.01604):

        AUC = P(loss(holdout) > loss(forget)) + 1/2 P(loss(holdout) = loss(forget)).

    1 means that forget samples look like members, 0 that they stand out as worse than unseen data. A model trained
    without the forget set lies near 0.5: compare with its AUC where there is one. Both sides are cause for alarm.

    Held-out data must be never trained on and of the distribution of the forget set: the retain set is no substitute.
    Evaluate both in `eval()` mode and with the same transforms. The AUC is exact, from ranks: the losses may have any
    range. Across processes the samples are concatenated. A sampler that pads with duplicates (`DistributedSampler`)
    counts them twice, unless `ids` are given: of samples of one class with the same id the first is kept.

    `compute` returns NaN, and the attribute `reason` says why, where a class is empty or a loss is NaN.

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

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    losses: list[Tensor] | Tensor
    members: list[Tensor] | Tensor
    ids: list[Tensor] | Tensor
    reason: str | None
    """Why the last `compute` or `interval` returned NaN; None if it did not."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("losses", [], dist_reduce_fx="cat")
        self.add_state("members", [], dist_reduce_fx="cat")
        self.add_state("ids", [], dist_reduce_fx="cat")
        self.reason = None

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
        members = _as_flags(is_member, losses.device)
        if members.dtype != torch.bool or members.shape not in ((), losses.shape):
            raise HAMUValueError(
                f"Expected `is_member` to be boolean, of shape [] or {list(losses.shape)}, but got {members.dtype} "
                f"of shape {list(members.shape)}. Give True for samples of the forget set and False for held-out ones."
            )
        if isinstance(ids, list):
            ids = torch.tensor([check_count("ids", i, least=-(2**53), most=2**53) for i in ids])
        if ids is not None and not isinstance(ids, Tensor):
            ids = as_numbers("ids", ids, losses.device)
        if ids is not None and (ids.shape != losses.shape or ids.is_floating_point()):
            raise HAMUValueError(
                f"Expected `ids` to be integers of shape {list(losses.shape)}, but got {ids.dtype} of shape "
                f"{list(ids.shape)}. Give the index of each sample in its data set."
            )
        assert isinstance(self.losses, list) and isinstance(self.members, list) and isinstance(self.ids, list)
        dtype = widest_float(losses.device)
        # NaN differs from every id, itself included.
        self.ids.append(
            torch.full_like(losses, torch.nan, dtype=dtype) if ids is None else ids.to(losses.device, dtype)
        )
        self.losses.append(losses.to(dtype))
        self.members.append(members.expand_as(losses).to(dtype))

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
        """Return the AUC, 0-d; NaN with a `reason` where it is not defined."""
        forget, holdout = self._split()
        if self.reason is not None:
            return torch.full((), torch.nan, dtype=forget.dtype, device=forget.device)
        holdout = holdout.sort().values
        # Held-out losses below, and not above, each forget loss: the mean of the two counts ties half.
        below = torch.searchsorted(holdout, forget)
        not_above = torch.searchsorted(holdout, forget, right=True)
        # Whole numbers until the last division, so that the result is exact.
        pairs = 2 * forget.numel() * holdout.numel()
        return (pairs - (below + not_above).sum()).to(forget.dtype) / pairs

    def interval(self, confidence: float = 0.95, samples: int = 1000, seed: int = 0) -> Interval:
        """Estimate how far the AUC could lie from its value by the choice of samples alone.

        Percentile interval of a stratified bootstrap: forget and held-out samples are drawn again with replacement,
        each class as often as it has samples. It does not cover the spread over trainings, and it is too narrow with
        few samples per class; where all pairs are in one order it has width 0. Call it on all processes.

        Args:
            confidence: Probability to be covered, between 0 and 1.
            samples: Number of draws.
            seed: Seed of the draws; they leave the global random state alone.

        Returns:
            The limits, NaN where the AUC is.

        Raises:
            HAMUValueError: If `confidence` or `samples` is out of range.

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
        should_sync = self._to_sync and not self._is_synced
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=should_sync, should_unsync=self._should_unsync
        ):
            forget, holdout = self._split()
        if self.reason is not None:
            nan = torch.full((), torch.nan, dtype=forget.dtype, device=forget.device)
            return Interval(nan, nan.clone())
        aucs = _bootstrap(forget.cpu(), holdout.cpu(), samples, seed)
        tail = (1 - confidence) / 2
        limits = torch.quantile(aucs, torch.tensor([tail, 1 - tail], dtype=aucs.dtype))
        lower, upper = limits.to(forget.device, forget.dtype)
        return Interval(lower, upper)

    @override
    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self.reason = None

    def _split(self) -> tuple[Tensor, Tensor]:
        """Return the losses of forget and held-out samples, and set `reason` if no AUC can be made of them."""
        if isinstance(self.losses, list) and not self.losses:
            losses = members = torch.zeros(0, device=self.device, dtype=self.dtype)
        else:
            losses, members = dim_zero_cat(self.losses), dim_zero_cat(self.members)
            kept = _find_first(members, dim_zero_cat(self.ids))
            losses, members = losses[kept], members[kept]
        forget, holdout = losses[members > 0], losses[members == 0]
        self.reason = _find_reason(forget, holdout)
        return forget, holdout


def _as_flags(is_member: Any, device: torch.device) -> Tensor:
    try:
        return torch.as_tensor(is_member, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise HAMUValueError(
            f"Expected `is_member` to be True, False, or boolean of shape [N], but got {describe(is_member)}."
        ) from error


def _find_first(members: Tensor, ids: Tensor) -> Tensor:
    """Index of the first sample of each class and id, in the order of the samples."""
    order = ids.sort(stable=True).indices
    order = order[members[order].sort(stable=True).indices]
    # A difference with NaN is not 0: a sample without an id repeats none.
    is_repeat = torch.zeros_like(order, dtype=torch.bool)
    is_repeat[1:] = (members[order].diff() == 0) & (ids[order].diff() == 0)
    return order[~is_repeat].sort().values


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


def _bootstrap(forget: Tensor, holdout: Tensor, samples: int, seed: int) -> Tensor:
    """Return the AUC of `samples` draws with replacement.

    The order of the losses does not change between draws, only how often each is drawn. So they are sorted once.
    """
    generator = torch.Generator().manual_seed(seed)
    n_forget, n_holdout = forget.numel(), holdout.numel()
    holdout = holdout.sort().values
    below, not_above = torch.searchsorted(holdout, forget), torch.searchsorted(holdout, forget, right=True)
    pieces = []
    for count in _split_count(samples, max(1, _PIECE // (n_forget + n_holdout))):
        drawn = _draw(count, n_forget, generator)  # [count, n_forget]
        # Column k: how many of the drawn held-out losses are among the k lowest.
        lowest = torch.nn.functional.pad(_draw(count, n_holdout, generator).cumsum(dim=1), (1, 0))
        pieces.append((drawn * (lowest[:, below] + lowest[:, not_above])).sum(dim=1))
    pairs = 2 * n_forget * n_holdout
    return (pairs - torch.cat(pieces)).double() / pairs


def _split_count(total: int, piece: int) -> list[int]:
    return [min(piece, total - start) for start in range(0, total, piece)]


def _draw(rows: int, n: int, generator: torch.Generator) -> Tensor:
    """How often each of `n` samples is drawn in `n` draws with replacement: `[rows, n]`."""
    index = torch.randint(n, (rows, n), generator=generator)
    return torch.zeros(rows, n, dtype=torch.long).scatter_add_(1, index, torch.ones_like(index))
