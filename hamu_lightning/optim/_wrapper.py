"""An optimizer that stands for another one."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch.optim import Optimizer
from typing_extensions import override

from hamu_lightning.optim._checks import check_group


class OptimizerWrapper(Optimizer):
    """Hands out what belongs to its base: schedulers and checkpoints work on the wrapper and on the base alike.

    `Optimizer.__init__`, which would make parameter groups and a state of the wrapper's own, is never called.
    """

    @property
    @abstractmethod
    def base(self) -> Optimizer:
        """The wrapped optimizer."""

    @property
    def optimizer(self) -> Optimizer:
        """The base, by the name under which Lightning looks for what a wrapper wraps: LearningRateMonitor lists it."""
        return self.base

    def __getattr__(self, name: str) -> Any:
        """What only the base has, such as the `train()` and `eval()` of an optimizer without a schedule."""
        if name.startswith("_") or name == "base":  # torch's own, and what a half-made copy lacks
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state, nothing else."""
        return self.base.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the base optimizer's state."""
        self.base.load_state_dict(state_dict)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer.

        Raises:
            HAMUValueError: If the group cannot be used.
        """
        check_group(self.base, param_group)
        self.base.add_param_group(param_group)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups: the very list, also after it was replaced by `load_state_dict`."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's defaults."""
        return self.base.defaults
