"""The one hyper-parameter of each method, and how its value is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from hamu_lightning.checks import check_number, check_type, store
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.methods._evaluation import Seen
from hamu_lightning.methods._protocol import Method
from hamu_lightning.metrics.functional import match_classes

TuneBy: TypeAlias = Literal["retrained", "validation"]


@dataclass(frozen=True)
class Search:
    """A method whose main hyper-parameter is chosen on validation data.

    Args:
        make: Makes the method from a value.
        low: The smallest value, positive.
        high: The largest value.

    Raises:
        HAMUValueError: If the range is empty or not positive.

    Example:
        >>> from hamu_lightning.methods import SSD
        >>> Search(SSD, 1, 100).values(3)
        [1.0, 10.0, 100.0]
    """

    make: Callable[[float], Method]
    low: float
    high: float

    def __post_init__(self) -> None:
        check_type("make", self.make, Callable, "a function that makes the method from a value")
        low, high = (check_number(name, getattr(self, name)) for name in ("low", "high"))
        if not 0 < low <= high:
            raise HAMUValueError(f"Expected 0 < `low` <= `high`, but got {low} and {high}.")
        store(self, low=low, high=high)

    def values(self, trials: int) -> list[float]:
        """Return the values to try: so many, at equal ratios from `low` to `high`; a single one is their mean."""
        if trials == 1:
            return [math.sqrt(self.low * self.high)]
        ratio = self.high / self.low
        return [self.low * ratio ** (i / (trials - 1)) for i in range(trials)]


def score(seen: Seen, retrained: Seen, original: Seen, tune_by: TuneBy) -> float:
    """Return how bad a trial is. Test data play no part.

    - "retrained": mean of `|acc(w) - acc(w_R)|` over the retain, the forget and the validation set. Needs what
      unlearning is to save, and is for comparisons: each method is at its best under the same knowledge.
    - "validation": `|L_f(w) - L_v(w_0)| + |L_r(w) - L_r(w_0)|`, nats, where `L_v(w_0)` is the original's mean loss on
      validation samples of the classes of the forget set: forgotten samples should be like unseen ones, retained ones
      as they were. For a class that is forgotten as a whole it forgets too little.

    A number that is not finite counts as infinitely bad.

    Raises:
        HAMUValueError: With "validation", if the validation set lacks a class of the forget set.
    """
    if tune_by == "retrained":
        pairs = list(zip(seen[:3], retrained[:3], strict=True))
        found = sum(abs(ours.accuracy - theirs.accuracy) for ours, theirs in pairs) / len(pairs)
    else:
        unseen = original.val.select(match_classes(original.val.labels, like=seen.forget.labels))
        if not len(unseen.labels):
            raise HAMUValueError(
                "Expected the validation set to have samples of all classes of the forget set, but one is missing. Use "
                "tune_by='retrained', or add samples of that class."
            )
        found = abs(seen.forget.loss - unseen.loss) + abs(seen.retain.loss - original.retain.loss)
    # Accuracies hide weights that are no numbers: argmax of NaN is a class as well.
    losses = (seen.retain.loss, seen.forget.loss, seen.val.loss)
    return found if all(map(math.isfinite, (found, *losses))) else math.inf
