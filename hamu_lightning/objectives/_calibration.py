"""How sure of its label a model is that never saw the sample: learnt from held-out samples, without retraining."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hamu_lightning.errors import HAMUStateError
from hamu_lightning.gramian import widest_float

# A class with fewer held-out samples has no quantiles of its own: such classes are put together.
FEW = 10
# The rank of a sample is found among so many others at most: those of long sequences and of images are thinned out.
_MOST_KNOTS = 4096


class Calibration:
    """For each forget sample the log-odds of its label that a model without it would have.

        phi_t = min(phi0, q((rank(phi0) + 1/2) / n) + log(share of the class that is kept))

    docs/method.md#an-unseen-sample, eq. 13.2. `rank` counts from 0 among the `n` forget samples of the same class, and
    `q` are the quantiles of that class's held-out log-odds (the i-th smallest of m at (i + 1/2)/m, straight between
    them). Classes with fewer than 10 held-out samples are one class in this, in which a held-out sample counts
    `n_forget / n_held_out` of its class; where they have no held-out sample at all, the held-out samples of all classes
    stand for theirs. The log-odds `phi0` are those of the model before unlearning, by which a sample is found again:
    between two forget samples the way is straight, so that rounding stays rounding.

    It is empty until `fit`. Its state holds sorted numbers and counts, and no sample.

    Example:
        >>> calibration, labels = Calibration(), torch.zeros(10, dtype=torch.int64)
        >>> calibration.fit((torch.arange(10.0) + 5, labels), (torch.arange(10.0), labels), torch.tensor([0.75]))
        >>> [round(float(x), 3) for x in calibration.find(torch.tensor([5.0, 14.0]), labels[:2])]
        [-0.288, 8.712]
    """

    def __init__(self) -> None:
        self._tables: dict[str, Tensor] = {}
        self.has_whole_classes = self.has_samples = False

    def fit(self, forget: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor] | None, share: Tensor) -> None:
        """Learn.

        Args:
            forget: Log-odds of the labels of all that is to be forgotten, `[n]`, and the labels, int64 `[n]`.
            held_out: The same for data that were never trained on; None where all classes go as a whole.
            share: Which share of each class is kept, `[C]` in [0, 1]; a class with 0 goes as a whole.

        Raises:
            HAMUStateError: If nothing is to be forgotten, no class stays, or there are no held-out samples for those
                that stay.
        """
        share, sizes = share.double().cpu(), len(share)
        forgotten = _count(forget[1], sizes)
        for what, is_there in (("samples to forget", forgotten.any()), ("a class that is kept", share.any())):
            if not bool(is_there):
                raise HAMUStateError(f"Expected {what}, but there is none. Check the labels of the data.")
        stays = (share > 0) & (forgotten > 0)
        self.has_whole_classes, self.has_samples = bool((forgotten[share == 0] > 0).any()), bool(stays.any())
        knots = [(torch.zeros(1).double(), torch.full((1,), math.inf).double())]  # for labels that nobody has seen
        stratum = torch.zeros(sizes, dtype=torch.int64)
        if self.has_samples:
            if held_out is None or not len(held_out[0]):
                raise HAMUStateError(
                    "Expected held-out samples, since some samples to forget are of classes that stay, but there are "
                    "none. Give data that the model was never trained on: Unseen(data)."
                )
            for group in _group_classes(stays, _count(held_out[1], sizes)):
                stratum[group] = len(knots)
                knots.append(_match_ranks(_sorted(*forget, group), *_weigh(*held_out, group, forgotten)))
        ends = torch.tensor([len(x) for x, _ in knots]).cumsum(0)
        log_odds, aims = (torch.cat(parts) for parts in zip(*knots, strict=True))
        places = torch.arange(len(knots)).repeat_interleave(torch.tensor([len(x) for x, _ in knots]))
        self._tables = {
            "share": share,
            "stratum": stratum,
            "log_odds": log_odds,
            "aims": aims,
            "keys": places + _squash(log_odds),
            "first": torch.cat((torch.zeros(1, dtype=torch.int64), ends[:-1])),
            "last": ends - 1,
        }

    def find(self, log_odds: Tensor, labels: Tensor) -> Tensor:
        """Find phi_t.

        Args:
            log_odds: `phi0` of any shape.
            labels: int64, of the same shape.

        Returns:
            Of the same shape and dtype; `phi0` itself for labels of which no sample was to be forgotten.
        """
        tables = self._on(log_odds.device)
        x = log_odds.to(tables["log_odds"].dtype)
        stratum = tables["stratum"][labels]
        index = torch.searchsorted(tables["keys"], stratum + _squash(x))
        first, last = tables["first"][stratum], tables["last"][stratum]
        below, above = (torch.clamp(i, first, last) for i in (index - 1, index))
        share = tables["share"][labels]
        # A class that goes as a whole has no aim here, and no number that is not one either.
        shift = torch.where(share > 0, share, 1.0).log()
        aim = _between(x, tables["log_odds"], tables["aims"], below, above) + shift
        return torch.minimum(aim.to(log_odds), log_odds)

    def are_whole(self, labels: Tensor) -> Tensor:
        """Whether the class of each label goes as a whole, bool, of the labels' shape."""
        return self.goes(labels.device)[labels]

    def goes(self, device: torch.device) -> Tensor:
        """Which classes go as a whole: no sample of them is kept; bool `[C]`."""
        return self._on(device)["share"] == 0

    def check_is_there(self) -> None:
        """Raise unless it has learnt."""
        if not self._tables:
            raise HAMUStateError(
                "Expected to know how sure of unseen samples the model is, but nothing was measured. "
                "HAMUCallback(forget, target=Unseen(holdout)) does it at the start of the fit; elsewhere call "
                "`calibration.fit`."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return sorted numbers and counts; empty before `fit`."""
        if not self._tables:
            return {}
        return {**self._tables, "has_whole_classes": self.has_whole_classes, "has_samples": self.has_samples}

    def final_state_dict(self) -> dict[str, Any]:
        """Return the same for a fit that has ended."""
        return self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned; an empty one forgets what was learnt."""
        self._tables = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self.has_whole_classes = bool(state.get("has_whole_classes", False))
        self.has_samples = bool(state.get("has_samples", False))

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        """The tables on a device, where they stay."""
        self.check_is_there()
        if self._tables["keys"].device != device:
            wide = widest_float(device)
            moved = {n: t.to(device, wide if t.is_floating_point() else t.dtype) for n, t in self._tables.items()}
            self._tables = moved
        return self._tables


def _group_classes(stays: Tensor, held_out: Tensor) -> list[Tensor]:
    """The classes with quantiles of their own, each by itself, and the others together; lists of their numbers."""
    own = stays & (held_out >= FEW)
    others = (stays & ~own).nonzero().flatten()
    return [*own.nonzero(), *([others] if len(others) else [])]


def _count(labels: Tensor, classes: int) -> Tensor:
    return torch.bincount(labels.cpu(), minlength=classes)


def _sorted(values: Tensor, labels: Tensor, group: Tensor) -> Tensor:
    return values[torch.isin(labels, group.to(labels))].double().cpu().sort().values


def _weigh(values: Tensor, labels: Tensor, group: Tensor, forgotten: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted held-out values of some classes, and how much each counts: classes as often as they are forgotten."""
    values, labels = values.double().cpu(), labels.cpu()
    chosen = torch.isin(labels, group)
    if not bool(chosen.any()):
        return values.sort().values, torch.ones(len(values), dtype=torch.float64)
    values, labels = values[chosen], labels[chosen]
    order = values.argsort()
    return values[order], (forgotten.double() / _count(labels, len(forgotten)).clamp(min=1))[labels[order]]


def _match_ranks(log_odds: Tensor, held_out: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct sorted log-odds, and for each the held-out one of the same rank; of ties the rank is the mean."""
    total = weights.cumsum(0)
    heights = (total - weights / 2) / total[-1]
    distinct, counts = torch.unique(log_odds, return_counts=True)
    counts = counts.double()
    ranks = (counts.cumsum(0) - counts / 2) / len(log_odds)
    above = torch.searchsorted(heights, ranks)
    below, above = (i.clamp(0, len(heights) - 1) for i in (above - 1, above))
    aims = _between(ranks, heights, held_out, below, above)
    if len(distinct) > _MOST_KNOTS:
        chosen = torch.linspace(0, len(distinct) - 1, _MOST_KNOTS).round().long()
        distinct, aims = distinct[chosen], aims[chosen]
    return distinct, aims


def _between(x: Tensor, xs: Tensor, ys: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """Straight from `(xs[below], ys[below])` to `(xs[above], ys[above])`, and level outside."""
    width = xs[above] - xs[below]
    share = ((x - xs[below]) / torch.where(width > 0, width, 1.0)).clamp(0.0, 1.0)
    way = torch.where(width > 0, share * (ys[above] - ys[below]), 0.0)
    return ys[below] + way


def _squash(log_odds: Tensor) -> Tensor:
    """Into 0 to 1, in the same order: the strata then follow one another."""
    return torch.atan(log_odds) / math.pi + 0.5
