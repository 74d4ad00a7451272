"""How far a model is from models that never saw what is forgotten, and how far these are from each other."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import torch

from hamu_lightning.methods._evaluation import Samples, Seen, measure
from hamu_lightning.metrics.functional import agreement, js_to_references, ks_test, log_odds_distance, share_surer

DISTANCES = ("JS", "JS_test", "KS", "agreement", "log_odds", "surer")


def measure_distances(seen: Seen, pool: Sequence[Seen], original: Seen) -> dict[str, float]:
    """Return how far a model is from a pool of retrained models, on average over the pool.

    - JS: Jensen-Shannon divergence of the predictions on the forget set, a share of its maximum ln 2. JS_test: the same
      on the test samples of the classes of the forget set.
    - KS: Kolmogorov-Smirnov distance of the losses on the forget set, 0 to 1.
    - agreement: share of forget samples with the same predicted class.
    - log_odds: mean absolute difference of the label's log-odds on the forget set, nats.
    - surer: share of forget samples whose label the model finds likelier than the original did. Not a distance: compare
      it with that of retrained models.

    A number is NaN where a prediction is, or no test sample is of these classes.
    """
    theirs, labels = [other.forget.log_probs for other in pool], seen.forget.labels
    test = [_of_classes(other.test, labels).log_probs for other in (seen, *pool)]
    ours = seen.forget.log_probs
    return {
        "JS": float(js_to_references(ours, theirs)),
        "JS_test": float(js_to_references(test[0], test[1:])),
        "KS": mean(float(ks_test(seen.forget.losses, other.forget.losses).distance) for other in pool),
        "agreement": float(agreement(ours, theirs)),
        "log_odds": float(log_odds_distance(ours, theirs, labels)),
        "surer": float(share_surer(seen.forget.losses, original.forget.losses)),
    }


def measure_floor(pool: Sequence[Seen], originals: Sequence[Seen]) -> list[dict[str, float]]:
    """Return the numbers of each retrained model against the others: what no method can be expected to fall below.

    Args:
        pool: At least two models.
        originals: What "surer" is counted against: the mean over them.
    """
    return [_compare_with_others(number, pool, originals) for number in range(len(pool))]


def _compare_with_others(number: int, pool: Sequence[Seen], originals: Sequence[Seen]) -> dict[str, float]:
    seen, others = pool[number], [*pool[:number], *pool[number + 1 :]]
    numbers = {**measure(seen, others[0]), **measure_distances(seen, others, originals[0])}
    numbers["KL"] = mean(measure(seen, other)["KL"] for other in others)
    numbers["surer"] = mean(measure_distances(seen, others[:1], original)["surer"] for original in originals)
    return numbers


def _of_classes(samples: Samples, labels: torch.Tensor) -> Samples:
    return samples.select(torch.isin(samples.labels, labels))
