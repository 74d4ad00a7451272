"""Numbers of the record in words, for readers who know no metric by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hamu_lightning.wording import count

# What is read first stands first: of distances and attacks those that stayed when weights were rounded, a model had
# relearned a little, or outputs were shifted (benchmarks/trusted_metrics.py). What is not here comes after these.
METRICS = {
    "FA": "Forgotten samples that the model still recognises",
    "RA": "Samples to keep that it recognises",
    "TA": "Test samples that it recognises, without classes that go",
    "surer": "Forgotten samples that it is surer of than before",
    "log_odds": "Distance from retrained models in how sure it is of the label (nats)",
    "ks": "Largest distance of the distributions of losses from retrained models",
    "trained_attack": "Samples that a trained attack sorts right",
    "auc": "How well the loss tells forgotten samples from held-out ones (AUC; alone it is easily fooled)",
    "js": "Distance of its answers from retrained models (Jensen-Shannon, 0 to 1)",
    "agreement": "Forgotten samples on which it answers as retrained models do",
    "activation": "Euclidean distance of its probabilities from retrained models",
    "kl": "Distance of its answers from retrained models (KL, nats)",
    "tpr_at_1": "Forgotten samples that an attack finds at 1 % false alarms",
    "tpr_at_0.1": "Forgotten samples that an attack finds at 0.1 % false alarms",
    "forget_loss": "Mean loss on the forgotten samples",
    "retain_loss": "Mean loss on the samples to keep",
    "holdout_loss": "Mean loss on held-out samples",
    "test_loss": "Mean loss on test samples",
    "forget_change": "Change of the loss on the forgotten samples",
    "retain_change": "Change of the loss on the samples to keep",
    "holdout_change": "Change of the loss on held-out samples",
    "test_change": "Change of the loss on test samples",
    "calibration": "Difference of confidence and accuracy on test samples",
}
"""For the name of a metric what it is."""
FIRST = 9
"""So many of them are shown at once, the others when somebody asks."""
_HIDDEN = ("UA",)  # one less FA
_SHARES = {"FA", "RA", "TA", "surer", "tpr_at_1", "tpr_at_0.1", "trained_attack", "agreement"}

KINDS = {
    "forgotten": "No trace found",
    "not_forgotten": "Not forgotten",
    "masked": "Only hidden",
    "suppressed": "Still inside",
    "harmed": "Model harmed",
    "over_forgotten": "Forgotten too much",
    "cannot_tell": "Cannot be told",
}
"""For the kind of a verdict its heading."""
NEXT = {
    "forgotten": "",
    "not_forgotten": "Unlearn again, with more steps or a target further away, or retrain without the data.",
    "masked": "Unlearn again with all weights free, or retrain without the data.",
    "suppressed": "Do not hand out the weights: unlearn again, or retrain without the data. If only answers leave the "
    "house, decide whether that is enough.",
    "harmed": "Train on with the data to keep, and measure again; or unlearn again with smaller steps.",
    "over_forgotten": "Unlearn again with a target that is nearer.",
    "cannot_tell": "Measure what is missing, and write this report again.",
}
"""For the kind of a verdict what is to be done; nothing where the text is empty."""
HOLDS = {"yes": "still there", "no": "nothing there", "unknown": "not known"}
"""For what a finding says, the words."""
COLUMNS = {"before": "before", "after": "after", "floor": "retrained"}
"""The columns of the table of metrics, with their headings."""

LEFT = 6
"""So many things that are left to do are listed about data in other places; a table has all of them."""
_PLACES = 3


def group_findings(findings: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what is to be done about places that hold something or may: each advice once, with all its places.

    Example:
        >>> rows = [{"place": f"{i}.ckpt: weights", "holds": "yes", "advice": "Delete it."} for i in range(5)]
        >>> [group["places"] for group in group_findings(rows)]
        ['0.ckpt, 1.ckpt, 2.ckpt and 2 more: weights']
        >>> group_findings([{**rows[0], "place": "cache: a"}, {**rows[0], "place": "cache: b"}])[0]["places"]
        'cache: a, b'
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for row in findings:
        if row["holds"] != "no":
            groups.setdefault((row["holds"], row["advice"]), []).append(row["place"])
    found = [{"places": _join(places), "holds": holds, "advice": advice} for (holds, advice), places in groups.items()]
    return sorted(found, key=lambda group: group["holds"] != "yes")


def _join(places: list[str]) -> str:
    """Places in a row; what all of them have before or after the colon is said once."""
    files, parts = zip(*(place.partition(": ")[::2] for place in places), strict=True)
    if len(places) > 1 and all(parts):
        if len({*files}) == 1:
            return f"{files[0]}: {_shorten(parts)}"
        if len({*parts}) == 1:
            return f"{_shorten(files)}: {parts[0]}"
    return _shorten(places)


def _shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - _PLACES} more" if len(names) > _PLACES else ""
    return ", ".join(names[:_PLACES]) + more


def say_size(request: Mapping[str, Any]) -> str:
    """Return how many samples a request names, and by how many ids where these have several.

    Example:
        >>> say_size({"n": 1}), say_size({"n": 9, "n_ids": 2}), say_size({"n": 9, "n_ids": 9})
        ('1 sample', '9 samples, those of 2 ids', '9 samples')
    """
    ids = request.get("n_ids")
    return count(request["n"], "sample") + (f", those of {count(ids, 'id')}" if ids and ids < request["n"] else "")


def order_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of all metrics of a record in the order to read them."""
    found = {name for column in COLUMNS for name in metrics.get(column) or {}}
    return [name for name in METRICS if name in found] + sorted(found - {*METRICS, *_HIDDEN})


def say(estimate: Mapping[str, Any] | None, name: str = "") -> str:
    """Return an estimate of a record as text; a share in percent.

    Example:
        >>> number = {"value": 0.25, "bound": None}
        >>> say(number, "FA"), say(number), say({"value": None, "reason": "no sample"}), say(None)
        ('25 %', '0.25', '-', '')
    """
    if estimate is None:
        return ""
    if estimate["value"] is None:
        return "-"
    words = f"{estimate['bound']} " if estimate.get("bound") else ""
    return words + say_number(estimate["value"], name)


def say_interval(estimate: Mapping[str, Any] | None, name: str = "") -> str:
    """Return its interval and its n, or why there is no number.

    Example:
        >>> say_interval({"value": 0.25, "interval": [0.125, 0.5], "n": [40], "reason": None}, "FA")
        '12.5 to 50 %, n = 40'
    """
    if estimate is None:
        return ""
    if estimate["value"] is None:
        return str(estimate["reason"])
    limits = estimate["interval"] or []
    parts = [" to ".join("?" if x is None else say_number(x, name) for x in limits)] if limits else []
    if name in _SHARES and parts:
        parts[0] = parts[0].replace(" % to", " to")
    counts = [f"n = {' + '.join(map(str, estimate['n']))}"] if estimate["n"] else []
    return ", ".join(parts + counts)


def say_number(value: float, name: str = "") -> str:
    """Return a number, a share in percent."""
    return f"{100 * value:.3g} %" if name in _SHARES else f"{value:.3g}"
