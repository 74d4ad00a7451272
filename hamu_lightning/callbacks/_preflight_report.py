"""What a preflight found: numbers with intervals, one table, and advice in words."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEVEL = 0.95
_RESAMPLES = 2_000
# Below this share of the capacity, what is free of damage counts as less than all of it.
_HARMONY = 0.99
# A terminal's, and the table's.
_WIDTH = 80

ROWS = {
    "forget_loss": "forget loss",
    "retain_loss": "retain loss",
    "retain_norm": "length of the retain gradient",
    "forget_norm": "length of the forget gradient",
    "kappa": "kappa, the hardness g_r·g_f",
    "kappa_1": "kappa_1 of the model as one block",
    "kappa_2": "kappa_2 of the model as one block",
    "cosine": "cosine of the two gradients",
    "conflicting_blocks": "share of blocks in conflict",
    "direct_blocks": "share of blocks up to their kappa_1",
    "damaging_blocks": "share of blocks above their kappa_2",
    "quota": "quota of the rule, per step",
    "largest_quota": "largest quota that the radius allows",
    "free_quota": "largest quota that is free of damage",
    "infeasible": "pairs where the quota cannot be had",
    "forget_improvement": "rise of the forget loss per step",
    "retain_cost": "rise of the retain loss per step",
    "steps_to_target": "steps to the target",
    "retain_cost_to_target": "rise of the retain loss on the way",
}


@dataclass(frozen=True)
class Estimate:
    """A mean over batch pairs.

    Args:
        mean: The mean (of a ratio: the ratio of the means).
        low: Where its 95 % bootstrap interval begins; NaN with fewer than two batch pairs.
        high: Where it ends.
        values: The value of each batch pair; empty for what is only known of the means.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...] = ()

    def __str__(self) -> str:
        interval = "-" if math.isnan(self.low) else f"{self.low:.4g} .. {self.high:.4g}"
        return f"{self.mean:>11.4g}   {interval}"


@dataclass(frozen=True)
class PreflightReport:
    """What is known about an unlearning run before its first step. `print(report)` shows the table and the advice.

    All predictions are to first order, from the weights as they are. Improvements, costs and quotas are in loss units
    per step. The names of the estimates, each a mean over batch pairs (one retain, one forget batch):

    - `retain_loss`, `forget_loss`, `retain_norm`, `forget_norm`: losses and lengths of the gradients.
    - `kappa`, `cosine`: hardness `g_r·g_f` and cosine of the whole model, positive in conflict; `conflicting_blocks`:
      the share of blocks with a positive cosine.
    - `kappa_1`, `kappa_2`: the thresholds of DESIGN 1.2 for the whole model as one block, whose radius is the length of
      the longest step that all blocks can make together. NaN where nothing can move. `direct_blocks`: the share of
      blocks up to their own kappa_1, whose part of the quota plain descent gives; `damaging_blocks`: the share above
      their own kappa_2, which must harm the other objective.
    - `quota`: the rule's; `largest_quota`: what the trust region allows, `sum_b R_b |g_f,b|` (HAMU-U: `|g_r,b|`);
      `free_quota`: the most that a step can give without harm to the other objective (DESIGN 1.4);
      `infeasible`: the share of pairs in which the quota exceeds the largest one.
    - `forget_improvement`, `retain_cost`: what the rule's own step does to both losses; a negative cost is a gain.
    - `steps_to_target`, `retain_cost_to_target`: only with a target, at the `forget_improvement` of the rule's step.
      Infinite where the forget loss does not rise. The gradient of cross-entropy grows as a model forgets: where the
      quota cannot be had yet, the steps are fewer.

    Args:
        estimates: The estimates by name.
        advice: Sentences.
        pairs: Number of batch pairs that were used.
        left_out: Number of batch pairs whose numbers were not finite.
        blocks: Number of blocks of weights.
        target: The forget loss to be reached, or None.
    """

    estimates: Mapping[str, Estimate]
    advice: tuple[str, ...]
    pairs: int
    left_out: int
    blocks: int
    target: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return everything in numbers, strings, lists and dicts; what needs a target is None without one."""
        estimates = {
            name: {"mean": e.mean, "low": e.low, "high": e.high, "values": list(e.values)}
            for name, e in self.estimates.items()
        }
        rest = {name: getattr(self, name) for name in ("pairs", "left_out", "blocks", "target")}
        return {**dict.fromkeys(ROWS), **estimates, **rest, "advice": list(self.advice)}

    def __str__(self) -> str:
        width = max(map(len, ROWS.values()))
        lines = [f"{ROWS[name]:<{width}}{estimate}" for name, estimate in self.estimates.items()]
        head = f"HAMU preflight: {self.pairs} batch pairs, {self.blocks} blocks of weights"
        title = f"{'':<{width}}{'mean':>11}   {LEVEL:.0%} interval over the pairs"
        advice = (
            textwrap.fill(s, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
            for s in self.advice
        )
        return "\n".join((head, title, *lines, *advice))


def make_report(
    rows: Sequence[Mapping[str, float]], *, left_out: int, blocks: int, target: float | None, bound: str
) -> PreflightReport:
    """Summarise the numbers of each batch pair.

    Args:
        rows: For each batch pair with finite numbers its values by name.
        left_out: How many batch pairs had numbers that are not finite.
        blocks: Number of blocks.
        target: The forget loss to be reached, or None.
        bound: The objective that the quota is about: "forget" (HAMU-Q) or "retain" (HAMU-U).
    """
    columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    estimates = {
        name: Estimate(*bootstrap(torch.tensor([values], dtype=torch.float64).T), tuple(values))
        for name, values in columns.items()
    }
    if rows and target is not None:
        for name, function in (("steps_to_target", count_steps), ("retain_cost_to_target", sum_cost)):
            triple = torch.tensor([columns[n] for n in ("forget_loss", "forget_improvement", "retain_cost")])
            estimates[name] = Estimate(*bootstrap(triple.double().T, lambda means, f=function: f(means, target)))  # type: ignore[misc]
    advice = tuple(advise(estimates, left_out, target, bound))
    return PreflightReport(estimates, advice, len(rows), left_out, blocks, target)


def bootstrap(
    samples: Tensor, statistic: Callable[[Tensor], Tensor] = lambda means: means[:, 0], seed: int = 0
) -> tuple[float, float, float]:
    """Estimate a function of means, and its percentile bootstrap interval.

    Args:
        samples: `[n, K]`, float64, independent rows.
        statistic: From means `[S, K]` to values `[S]`.
        seed: Of the resampling's own generator.

    Returns:
        The value at the sample means, and the ends of the 95 % interval (NaN for fewer than two rows).

    Example:
        >>> mean, low, high = bootstrap(torch.arange(16, dtype=torch.float64).unsqueeze(1))
        >>> mean, 4 < low < 6, 9 < high < 11
        (7.5, True, True)
    """
    n = len(samples)
    value = float(statistic(samples.mean(dim=0, keepdim=True)))
    if n < 2:
        return value, math.nan, math.nan
    drawn = torch.randint(n, (_RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
    counts = samples.new_zeros(_RESAMPLES, n).scatter_add_(1, drawn, samples.new_ones(_RESAMPLES, n))
    # Taken from the sorted values: an infinite one does not mix with its neighbour.
    resampled = statistic(counts @ samples / n).sort().values
    cut = int((1 - LEVEL) / 2 * _RESAMPLES)
    return value, float(resampled[cut]), float(resampled[-1 - cut])


def count_steps(means: Tensor, target: float) -> Tensor:
    """Steps from the forget loss to the target, `[S]`, from means of loss, improvement and cost `[S, 3]`."""
    loss, gain, _ = means.unbind(dim=1)
    needed = torch.where(gain > 0, (target - loss) / gain, torch.inf)
    return torch.where(loss >= target, 0, needed)


def sum_cost(means: Tensor, target: float) -> Tensor:
    """The retain cost of these steps, `[S]`; likewise."""
    cost = means[:, 2]
    return torch.where(cost == 0, 0, count_steps(means, target) * cost)


def advise(
    estimates: Mapping[str, Estimate], left_out: int, target: float | None = None, bound: str = "forget"
) -> list[str]:
    """Say in words what the numbers mean for the run."""
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
        return [*advice, _no_signal(bound)]
    if mean["largest_quota"] == 0:
        return [*advice, _NO_RADIUS]
    advice += _on_conflict(mean, bound)
    if mean["quota"] > 0:
        advice += _on_quota(mean, estimates["largest_quota"], bound)
    if target is not None:
        advice.append(_on_target(mean, estimates["steps_to_target"], target))
    return advice


_NO_RADIUS = (
    "No block can move: every radius is 0 where there is a gradient. With LearningRateRadius that is a learning rate "
    "or a retain gradient of 0; HAMUQ(quota, radius=RelativeRadius(1e-3)) lets the weights move by a share of their "
    "own length."
)


def _no_signal(bound: str) -> str:
    return (
        f"There is no {bound} signal: the {bound} gradient is 0 in every batch, so that to first order no step changes "
        f"the {bound} loss. Check that `training_step` uses the {bound} samples and that the weights they pass through "
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


def _on_quota(mean: Mapping[str, float], largest: Estimate, bound: str) -> list[str]:
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
    step = f"each step is predicted to {verb} the {other} loss by {abs(harm):.2g}"
    if quota > mean["free_quota"]:
        advice.append(f"The quota of {quota:.3g} is above what is free of damage: {step}.")
    else:
        cure = " allocation='optimal' would avoid that." if harm > 0 else ""
        advice.append(f"The quota of {quota:.3g} can be had without damage: {step}.{cure}")
    return advice


def _on_target(mean: Mapping[str, float], steps: Estimate, target: float) -> str:
    now = f"the forget loss is {mean['forget_loss']:.3g} now"
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
        f"The target of {target:.3g} is about {math.ceil(steps.mean)} steps away{interval}: {now}. If gradients stayed "
        f"as they are, these steps would {verb} the retain loss by {abs(cost):.2g} in all."
    )
