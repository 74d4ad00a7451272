"""What a preflight found: numbers with intervals, one table, and advice in words."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hamu_lightning.callbacks.forecast._advice import advise
from hamu_lightning.callbacks.forecast._estimates import LEVEL, Estimate, bootstrap, count_steps, sum_cost
from hamu_lightning.wording import count

# A terminal's, and the table's.
_WIDTH = 80
ROWS = {
    "forget_loss": "{raised}",
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
    "forget_improvement": "rise of {it} per step",
    "retain_cost": "rise of the retain loss per step",
    "steps_to_target": "steps to the target",
    "retain_cost_to_target": "rise of the retain loss on the way",
}


@dataclass(frozen=True)
class PreflightReport:
    """What is known about an unlearning run before its first step. `print(report)` shows the table and the advice.

    All predictions are to first order, from the weights as they are. Improvements, costs and quotas are in loss units
    per step. The names of the estimates, each a mean over batch pairs (one retain, one forget batch):

    - `retain_loss`, `forget_loss`, `retain_norm`, `forget_norm`: losses and lengths of the gradients; those of the
      forget data of what is `raised`, where that is not the module's loss.
    - `kappa`, `cosine`: hardness `g_r·g_f` and cosine of the whole model, positive in conflict; `conflicting_blocks`:
      the share of blocks with a positive cosine.
    - `kappa_1`, `kappa_2`: the thresholds of docs/method.md#closed-form, eq. 3.3, for the whole model as one block,
      whose radius is the length of the longest step that all blocks can make together. NaN where nothing can move.
      `direct_blocks`: the share of blocks up to their own kappa_1, whose part of the quota plain descent gives;
      `damaging_blocks`: the share above their own kappa_2, which must harm the other objective.
    - `quota`: the rule's; `largest_quota`: what the trust region allows, `sum_b R_b |g_f,b|` (HAMU-U: `|g_r,b|`);
      `free_quota`: the most that a step can give without harm to the other objective
      (docs/method.md#certificates, eq. 6.4);
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
        raised: What is raised on the forget data, in words.
    """

    estimates: Mapping[str, Estimate]
    advice: tuple[str, ...]
    pairs: int
    left_out: int
    blocks: int
    target: float | None = None
    raised: str = "forget loss"

    def as_dict(self) -> dict[str, Any]:
        """Return everything in numbers, strings, lists and dicts; what needs a target is None without one."""
        estimates = {
            name: {"mean": e.mean, "low": e.low, "high": e.high, "values": list(e.values)}
            for name, e in self.estimates.items()
        }
        rest = {name: getattr(self, name) for name in ("pairs", "left_out", "blocks", "target", "raised")}
        return {**dict.fromkeys(ROWS), **estimates, **rest, "advice": list(self.advice)}

    def __str__(self) -> str:
        it = "the forget loss" if self.raised == "forget loss" else "what is raised"
        names = {name: words.format(raised=self.raised, it=it) for name, words in ROWS.items()}
        width = max(map(len, names.values()))
        lines = [f"{names[name]:<{width}}{estimate}" for name, estimate in self.estimates.items()]
        head = f"HAMU preflight: {count(self.pairs, 'batch pair')}, {count(self.blocks, 'block')} of weights"
        title = f"{'':<{width}}{'mean':>11}   {LEVEL:.0%} interval over the pairs"
        advice = (
            textwrap.fill(s, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
            for s in self.advice
        )
        return "\n".join((head, title, *lines, *advice))


def make_report(
    rows: Sequence[Mapping[str, float]],
    *,
    left_out: int,
    blocks: int,
    target: float | None,
    bound: str,
    raised: str = "forget loss",
) -> PreflightReport:
    """Summarise the numbers of each batch pair.

    Args:
        rows: For each batch pair with finite numbers its values by name.
        left_out: How many batch pairs had numbers that are not finite.
        blocks: Number of blocks.
        target: The forget loss to be reached, or None.
        bound: The objective that the quota is about: "forget" (HAMU-Q) or "retain" (HAMU-U).
        raised: What is raised on the forget data, in words.
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
    advice = tuple(advise(estimates, left_out, target, bound, raised))
    return PreflightReport(estimates, advice, len(rows), left_out, blocks, target, raised)
