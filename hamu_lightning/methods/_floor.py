"""Models that were retrained with other seeds: what all others are measured by, and the floor of what can be had."""

from __future__ import annotations

from collections.abc import Sequence

from hamu_lightning.methods._evaluation import Seen, evaluate_parts
from hamu_lightning.methods._pool import measure_floor
from hamu_lightning.methods._problem import Problem, Run, ask_metrics, list_log_odds, train

ANOTHER = "another retrained"


class Pool:
    """Retrained models with seeds of their own.

    Args:
        problem: The problem.
        seeds: One model for each.
    """

    def __init__(self, problem: Problem, seeds: Sequence[int]) -> None:
        self._seeds, self._costs, self._metrics = seeds, [], []
        self.seen: list[Seen] = []
        """What they say about the four sets."""
        for seed in seeds:
            module, cost = train(problem, "retrained", seed, problem.datamodule)
            self.seen.append(evaluate_parts(module, problem.parts))
            self._metrics.append(ask_metrics(problem, module))
            self._costs.append(cost)

    def runs(self, originals: Sequence[Seen]) -> list[Run]:
        """Return each member as if it were a method: measured against the others.

        Args:
            originals: What the originals of the reported seeds say.
        """
        if len(self._seeds) < 2:
            return []
        floors = measure_floor(self.seen, originals)
        parts = zip(self._seeds, floors, self._metrics, self._costs, self.seen, strict=True)
        return [
            Run(ANOTHER, seed, 0, None, 0.0, {**floor, **more}, *cost, [], list_log_odds(seen))
            for seed, floor, more, cost, seen in parts
        ]
