"""What the numbers of a preflight mean for the run, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping

from hamu_lightning.callbacks.forecast._estimates import Estimate
from hamu_lightning.wording import count

# Below this share of the capacity, what is free of damage counts as less than all of it.
_HARMONY = 0.99


def advise(
    estimates: Mapping[str, Estimate],
    left_out: int,
    target: float | None = None,
    bound: str = "forget",
    raised: str = "forget loss",
) -> list[str]:
    """Say in words what the numbers mean for the run."""
    names = {"forget": raised, "retain": "retain loss"}
    advice = []
    if left_out:
        advice.append(
            f"{left_out} of {left_out + len(estimates['quota'].values) if estimates else left_out} batch pairs gave "
            "numbers that are not finite and were left out: check the weights, the data and the precision."
        )
    if not estimates:
        return advice
    mean = {name: estimate.mean for name, estimate in estimates.items()}
    if mean[f"{bound}_norm"] == 0:
        return [*advice, _no_signal(bound, names[bound])]
    if mean["largest_quota"] == 0:
        return [*advice, _NO_RADIUS]
    advice += _on_conflict(mean, bound)
    if mean["quota"] > 0:
        advice += _on_quota(mean, estimates["largest_quota"], bound, names)
    if target is not None:
        advice.append(_on_target(mean, estimates["steps_to_target"], target, raised))
    return advice


_NO_RADIUS = (
    "No block can move: every radius is 0 where there is a gradient. With LearningRateRadius that is a learning rate "
    "or a retain gradient of 0; HAMUQ(quota, radius=RelativeRadius(1e-3)) lets the weights move by a share of their "
    "own length."
)


def _no_signal(bound: str, name: str) -> str:
    return (
        f"There is no {bound} signal: the {bound} gradient is 0 in every batch, so that to first order no step changes "
        f"the {name}. Check that `training_step` uses the {bound} samples and that the weights they pass through "
        "require gradients."
    )


def _on_conflict(mean: Mapping[str, float], bound: str) -> list[str]:
    free, share, cosine = mean["free_quota"], _percent(mean["conflicting_blocks"]), mean["cosine"]
    if free >= _HARMONY * mean["largest_quota"]:
        return [
            f"The two sets hardly conflict (cosine {cosine:.2g}, positive in {share} of the blocks): any quota up to "
            f"{free:.2g} per step, all that the trust region allows, is free of damage with allocation='optimal'."
        ]
    harm = "cost retain quality" if bound == "forget" else "undo forgetting"
    return [
        f"The two sets conflict in {share} of the blocks (cosine {cosine:.2g} over all): a quota above {free:.2g} per "
        f"step must {harm}; up to that, allocation='optimal' does no damage."
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _on_quota(mean: Mapping[str, float], largest: Estimate, bound: str, names: Mapping[str, str]) -> list[str]:
    quota = mean["quota"]
    if quota > mean["largest_quota"]:
        return [
            f"The quota of {quota:.3g} cannot be had: the trust region allows {largest.mean:.2g} at most. Lower the "
            f"quota, or make the radius {quota / largest.mean:.2g} times as large. (Gradients often grow as the model "
            "forgets, and with them what the region allows.)"
        ]
    advice = []
    if mean["infeasible"]:
        advice.append(
            f"In {_percent(mean['infeasible'])} of the batch pairs the quota of {quota:.3g} cannot be had: the trust "
            f"region allows {min(largest.values):.2g} in the worst of them."
        )
    other, harm = ("retain", mean["retain_cost"]) if bound == "forget" else ("forget", -mean["forget_improvement"])
    verb = "raise" if (harm > 0) == (bound == "forget") else "lower"
    step = f"each step is predicted to {verb} the {names[other]} by {abs(harm):.2g}"
    if quota > mean["free_quota"]:
        advice.append(f"The quota of {quota:.3g} is above what is free of damage: {step}.")
    else:
        cure = " allocation='optimal' would avoid that." if harm > 0 else ""
        advice.append(f"The quota of {quota:.3g} can be had without damage: {step}.{cure}")
    return advice


def _on_target(mean: Mapping[str, float], steps: Estimate, target: float, raised: str) -> str:
    now = f"the {raised} is {mean['forget_loss']:.3g} now, on training batches"
    if steps.mean == 0:
        return f"The target of {target:.3g} is reached already: {now}."
    if math.isinf(steps.mean):
        return (
            f"The target of {target:.3g} cannot be reached with this rule: {now}, and no step is predicted to raise it."
        )
    interval = "" if math.isnan(steps.low) else f" ({steps.low:.0f} to {steps.high:.0f})"
    cost = mean["retain_cost_to_target"]
    verb = "raise" if cost > 0 else "lower"
    return (
        f"The target of {target:.3g} is about {count(math.ceil(steps.mean), 'step')} away{interval}: {now}. If "
        f"gradients stayed as they are, these steps would {verb} the retain loss by {abs(cost):.2g} in all."
    )
