"""Notices when weights move without us: forgetting must never silently not happen."""

from __future__ import annotations

import torch
from torch import Tensor

from hamu_lightning.errors import HAMUStateError


class Watchdog:
    """Compares the optimized weights by value until the first call of `step()`.

    Version counters do not show writes through `.data`, so copies are kept, in host memory, for the first window only.

    Args:
        parameters: The weights that the wrapped optimizer trains.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self._watched = [(p, p.detach().to("cpu", copy=True)) for p in parameters if p.requires_grad]

    def check(self, calls: int) -> bool:
        """Return whether to go on watching.

        Raises:
            HAMUStateError: If a weight has moved although `step()` was not called.
        """
        if calls == 0 and any(not torch.equal(p.detach().cpu(), copy) for p, copy in self._watched):
            raise HAMUStateError(
                "Expected the weights to move through HAMUOptimizer only, but they moved before its first step. The "
                "module seems to step by itself (inside `training_step`, or through the raw optimizer): use "
                "HAMUOptimizer there, see the recipe for manual optimization."
            )
        return calls == 0
