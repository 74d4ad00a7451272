"""What a model says of the samples of each part of the data, and the numbers that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hamu_lightning.checks import check_choice
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.metrics.functional import (
    Estimate,
    accuracy,
    activation_distance,
    agreement,
    calibration_error,
    change,
    js_to_references,
    kl_to_references,
    ks_test,
    log_odds_distance,
    match_classes,
    mean_estimate,
    membership_auc,
    share_surer,
    tpr_at_fpr,
    trained_attack,
    undefined,
)

RETAIN, FORGET, HOLDOUT, TEST = "retain", "forget", "holdout", "test"
PARTS = (RETAIN, FORGET, HOLDOUT, TEST)
_LETTERS = {RETAIN: "RA", FORGET: "FA", TEST: "TA"}


@dataclass(frozen=True)
class PartScores:
    """What a model says of `N` samples, in evaluation mode; all tensors are on the CPU.

    Attributes:
        losses: `[N]`, float64, the module's own loss of each sample, in its unit.
        recognised: `[N]`, float64: 1 where the model gives the label, else 0; of a sequence the share of its places;
            NaN where the output does not say.
        ids: `[N]`, integers: where each sample stands in its Dataset.
        log_probs: `[N, K]`, float64, nats; None of what is no classifier with one class per sample.
        labels: `[N]`, integers; None likewise.

    Raises:
        HAMUValueError: If lengths differ.
    """

    losses: Tensor
    recognised: Tensor
    ids: Tensor
    log_probs: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the lengths."""
        lengths = {
            len(x) for x in (self.losses, self.recognised, self.ids, self.log_probs, self.labels) if x is not None
        }
        if len(lengths) != 1:
            raise HAMUValueError(
                f"Expected as many losses, labels and ids as samples, but got lengths {sorted(lengths)}. "
                "Give the numbers of the same samples."
            )

    def __len__(self) -> int:
        return len(self.losses)

    def select(self, index: Tensor) -> PartScores:
        """Return some of the samples."""
        columns = (self.losses, self.recognised, self.ids, self.log_probs, self.labels)
        return PartScores(*(None if x is None else x[index] for x in columns))  # type: ignore[arg-type]

    @property
    def loss(self) -> Estimate:
        """Mean loss."""
        return mean_estimate(self.losses, "losses")

    @property
    def accuracy(self) -> Estimate:
        """Share of what is recognised: of a classifier its accuracy."""
        if self.log_probs is not None and self.labels is not None:
            return accuracy(self.log_probs, self.labels)
        return mean_estimate(self.recognised, "shares of recognised places", limits=(0, 1))


@dataclass(frozen=True)
class Evaluation:
    """What one model says of the parts of the data: "retain", "forget", "holdout" and "test", as far as given.

    Attributes:
        parts: The scores, by name.
        is_whole: Whether each part was read to its end.

    Raises:
        HAMUValueError: If a name is unknown, or there is no forget part.

    Example:
        >>> losses = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
        >>> scores = PartScores(losses, torch.ones_like(losses), torch.arange(3))
        >>> print(Evaluation({"forget": scores, "holdout": scores}).numbers()["auc"].value)
        0.5
    """

    parts: Mapping[str, PartScores]
    is_whole: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        """Check the names."""
        for name in self.parts:
            check_choice("a name in `parts`", name, PARTS)
        if FORGET not in self.parts:
            raise HAMUValueError("Expected the data to forget among `parts`, but got none. Give it as 'forget'.")
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made anew: a view of a dict cannot be one."""
        return partial(Evaluation, is_whole=self.is_whole), (dict(self.parts),)

    @property
    def gone(self) -> Tensor:
        """The classes that are forgotten as a whole, sorted: those of forget samples that no retain sample has."""
        forget, retain = (self.parts[name].labels if name in self.parts else None for name in (FORGET, RETAIN))
        if forget is None or retain is None:
            return torch.empty(0, dtype=torch.long)
        classes: Tensor = torch.unique(forget)
        return classes[~torch.isin(classes, retain)]

    def comparable(self) -> PartScores | None:
        """The samples that the forgotten ones are compared with: held-out ones, of a classifier of the same classes.

        Held-out samples are those of "holdout", else of "test"; None where there are none of these classes.
        """
        held_out, forget = self.parts.get(HOLDOUT, self.parts.get(TEST)), self.parts[FORGET]
        if held_out is None or held_out.labels is None or forget.labels is None:
            return held_out
        index = match_classes(held_out.labels, like=forget.labels)
        return held_out.select(index) if len(index) else None

    def kept_test(self) -> PartScores | None:
        """The test samples of classes that stay."""
        test = self.parts.get(TEST)
        return test if test is None or test.labels is None else test.select(~torch.isin(test.labels, self.gone))

    def numbers(self, *, quick: bool = False) -> dict[str, Estimate]:
        """Return the numbers of this model alone.

        RA, FA, UA, TA (the last one without classes that go), the mean loss of each part, "auc" (membership by loss,
        forget samples against comparable held-out ones), "tpr_at_1" and "tpr_at_0.1" (at 1 % and 0.1 % false alarms),
        and of classifiers "trained_attack" and "calibration" (of the test set).

        Args:
            quick: Without the trained attack, which takes longest.
        """
        found = {f"{name}_loss": part.loss for name, part in self.parts.items()}
        kept = {**self.parts} | ({} if self.kept_test() is None else {TEST: self.kept_test()})
        found |= {_LETTERS[n]: p.accuracy for n, p in kept.items() if n in _LETTERS and p is not None}
        found["UA"] = _complement(found["FA"])
        return found | self._attacks(quick) | self._calibration()

    def since(self, before: Evaluation) -> dict[str, Estimate]:
        """Return what has changed: "<part>_change" of each mean loss, and "surer", the share of forgotten samples.

        Args:
            before: The same samples before unlearning.
        """
        both = [name for name in self.parts if name in before.parts]
        found = {f"{n}_change": change(self.parts[n].losses, before.parts[n].losses) for n in both}
        return {**found, "surer": share_surer(self.parts[FORGET].losses, before.parts[FORGET].losses)}

    def at(self, like: Evaluation) -> Evaluation | None:
        """Return the samples of another evaluation, in its order; None where one of them is not among these.

        Args:
            like: An evaluation of a part of the same data.
        """
        found = {}
        for name, scores in like.parts.items():
            mine = self.parts.get(name)
            order = None if mine is None else mine.ids.argsort()
            if mine is None or order is None:
                return None
            place = torch.searchsorted(mine.ids[order], scores.ids).clamp(max=len(mine) - 1)
            if not torch.equal(mine.ids[order][place], scores.ids):
                return None
            found[name] = mine.select(order[place])
        return Evaluation(found, is_whole=like.is_whole)

    def distances(self, references: Sequence[Evaluation]) -> dict[str, Estimate]:
        """Return how far the answers on the forget part are from those of models that never saw it.

        "js", "kl", "agreement", "activation", "log_odds" and "ks", see `hamu_lightning.metrics.functional`.

        Args:
            references: The same samples under retrained models; several are a pool.
        """
        mine, theirs = self.parts[FORGET], [other.parts[FORGET] for other in references]
        if not theirs:
            return {name: undefined("no retrained model was given", (len(mine),)) for name in _DISTANCES}
        distance = ks_test(mine.losses, torch.cat([x.losses for x in theirs])).distance
        scores, pool = mine.log_probs, [x.log_probs for x in theirs if x.log_probs is not None]
        if scores is None or len(pool) < len(theirs):
            unknown = undefined("it is no classifier with one class per sample", (len(mine),))
            return {**dict.fromkeys(_DISTANCES, unknown), "ks": distance}
        return {
            "js": js_to_references(scores, pool),
            "kl": kl_to_references(scores, pool),
            "agreement": agreement(scores, pool),
            "activation": activation_distance(scores, pool),
            "log_odds": log_odds_distance(scores, pool, mine.labels),
            "ks": distance,
        }

    def _attacks(self, quick: bool) -> dict[str, Estimate]:
        forget, held_out = self.parts[FORGET], self.comparable()
        if held_out is None:
            there = HOLDOUT in self.parts or TEST in self.parts
            why = "no held-out sample is of the forgotten classes" if there else "no held-out data was given"
            return dict.fromkeys(("auc", "tpr_at_1", "tpr_at_0.1"), undefined(why, (len(forget), 0), 0.5))
        found = {
            "auc": membership_auc(forget.losses, held_out.losses),
            "tpr_at_1": tpr_at_fpr(-forget.losses, -held_out.losses, 0.01),
            "tpr_at_0.1": tpr_at_fpr(-forget.losses, -held_out.losses, 0.001),
        }
        if not quick and forget.log_probs is not None and held_out.log_probs is not None:
            theirs = held_out.log_probs, held_out.labels
            found["trained_attack"] = trained_attack(forget.log_probs, forget.labels, *theirs)
        return found

    def _calibration(self) -> dict[str, Estimate]:
        test = self.kept_test()
        is_known = test is not None and test.log_probs is not None
        return {"calibration": calibration_error(test.log_probs, test.labels)} if is_known else {}  # type: ignore[union-attr]


_DISTANCES = ("js", "kl", "agreement", "activation", "log_odds", "ks")


def _complement(share: Estimate) -> Estimate:
    if share.interval is None:
        return share if share.reason is not None else Estimate(1 - share.value, n=share.n)
    lower, upper = share.interval
    return Estimate(1 - share.value, (1 - upper, 1 - lower), share.n)
