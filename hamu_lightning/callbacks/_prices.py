"""What requests and protections cost over the steps of a fit: means for the picture and the final table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hamu_lightning.report import MissingMatplotlibError, plot_costs
from hamu_lightning.solvers import GroupCoefficients

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_FIGURE = "hamu/costs"
_NOTE = (
    "Price: mean multiplier, by how much the retain loss would be lower per loss unit less asked for the group.\n"
    "Losses of groups without a target are those of training batches."
)


class Prices:
    """Sums up the multipliers of all groups, and their parts, on the device."""

    def __init__(self) -> None:
        # For the groups, and pairs of groups, of each problem that there was: `[2, K]`, sums and counts.
        self._totals: dict[tuple[str, ...], Tensor] = {}

    def add(self, step: GroupCoefficients) -> None:
        """Take a step in. What it does not know (it was infeasible) does not count."""
        protected = step.groups[1 : 1 + step.n_protected]
        keys = (*step.multipliers, *(f"{group}\n{request}" for group in protected for request in step.forgotten))
        values = torch.cat((torch.stack([*step.multipliers.values()]), step.costs.permute(1, 2, 0).flatten(0, 1)))
        known = values.isfinite()  # [K, P]
        added = torch.stack((torch.where(known, values, 0).sum(dim=1), known.sum(dim=1)))
        self._totals[keys] = self._totals[keys].to(added) + added if keys in self._totals else added

    @property
    def _by_key(self) -> dict[str, Tensor]:
        """Sum and count of each group and pair, `[2]`."""
        merged: dict[str, Tensor] = {}
        for keys, totals in self._totals.items():
            for key, total in zip(keys, totals.unbind(dim=1), strict=True):
                merged[key] = merged[key].to(total) + total if key in merged else total
        return merged

    def mean(self, group: str) -> float:
        """The mean multiplier of a group, retain loss units per loss unit of the group; NaN where none is known."""
        total = self._by_key.get(group)
        return math.nan if total is None else float(total[0] / total[1])

    def costs(self, protected: list[str], requests: list[str]) -> Tensor:
        """The mean costs, `[n_protected, n_forget]`."""
        return torch.tensor([[self.mean(f"{group}\n{request}") for request in requests] for group in protected])

    def draw(self, trainer: Trainer, protected: list[str], requests: list[str]) -> None:
        """Add the picture of the costs to the loggers that take one; nothing without matplotlib."""
        doors = [getattr(getattr(logger, "experiment", None), "add_figure", None) for logger in trainer.loggers]
        if not (protected and requests and self._totals and any(map(callable, doors))):
            return
        try:
            figure: Any = plot_costs(self.costs(protected, requests), protected, requests)
        except MissingMatplotlibError:
            return
        for door in filter(callable, doors):
            door(_FIGURE, figure, global_step=trainer.global_step, close=False)

    def format(self, path: Callable[[str], tuple[float, float]], protected: list[str], requests: list[str]) -> str:
        """A line for each group, where there are several.

        Args:
            path: Gives the loss of a group at the start and at the end.
            protected: The protected groups.
            requests: The groups to forget.
        """
        if len(protected) + len(requests) < 2:
            return ""
        roles = {"retain": "retained", **dict.fromkeys(protected, "protected"), **dict.fromkeys(requests, "forgotten")}
        width = max(map(len, (*roles, "group")))
        lines = [f"{'group':<{width}}  {'is':<9}  {'loss':>9} -> {'at end':<9}  price"]
        for name, role in roles.items():
            start, end = path(name)
            price = "" if name == "retain" else f"{self.mean(name):.3g}"
            lines.append(f"{name:<{width}}  {role:<9}  {start:>9.4g} -> {end:<9.4g}  {price}".rstrip())
        return "\n".join(("", *lines, _NOTE))

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, in tensors."""
        return {"totals": self._by_key}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        totals = state.get("totals", {})
        self._totals = {tuple(totals): torch.stack([*totals.values()], dim=1)} if totals else {}
