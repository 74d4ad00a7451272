"""Weights of an earlier step, to go back to."""

from __future__ import annotations

from itertools import compress
from typing import Any

from torch import Tensor

from hamu_lightning.optim import HAMUOptimizer, Snapshot

# What learning rate schedulers write into parameter groups; it follows the steps of the trainer, not the weights.
_SCHEDULED = ("lr", "momentum", "betas")


class KeptWeights:
    """A copy of the weights that an optimizer trains and of its state, where they are.

    Frozen weights are not copied. Those that are trained only later stay as they are, as do those that are added.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: HAMUOptimizer) -> None:
        self._optimizer = optimizer
        self._kept: Snapshot | None = None

    @property
    def are_there(self) -> bool:
        """Whether there is something to go back to."""
        return self._kept is not None

    def keep(self) -> None:
        """Copy the present weights and state, in place of those that were kept before."""
        self._kept = None  # first: memory holds one copy
        self._kept = Snapshot(self._optimizer, self._parameters)

    def release(self) -> None:
        """Let the copy go."""
        self._kept = None

    def restore(self) -> None:
        """Go back to what was kept; without it everything stays. Numbers of schedulers stay as well."""
        if self._kept is None:
            return
        groups = self._optimizer.param_groups
        scheduled = [{name: group[name] for name in _SCHEDULED if name in group} for group in groups]
        self._kept.restore()
        for group, numbers in zip(groups, scheduled, strict=True):
            group.update(numbers)

    def state_dict(self) -> dict[str, Any]:
        """Return the copy in tensors and numbers; nothing of sharded weights, of which each process has a part."""
        if self._kept is None or any(hasattr(p, "device_mesh") for p in self._parameters):
            return {}
        return self._kept.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep what `state_dict` returned."""
        parameters = self._parameters
        if state and len(state["weights"]) != len(parameters):  # of an earlier version, with the frozen ones
            is_trained = [p.requires_grad for group in self._optimizer.param_groups for p in group["params"]]
            state = {**state, **{name: [*compress(state[name], is_trained)] for name in ("weights", "state")}}
        self._kept = Snapshot.from_state_dict(self._optimizer, parameters, state) if state else None

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
