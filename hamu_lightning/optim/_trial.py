"""A step on trial: applied, judged by somebody, taken back exactly and tried again in a smaller trust region."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from hamu_lightning.optim._report import StepReport

Verdict: TypeAlias = Literal["accept", "retry", "drop"]


class Referee(Protocol):
    """Judges steps after they were applied.

    Attributes:
        region: What the radius of the rule is multiplied by; with a base other than plain SGD, its step.
    """

    region: float

    @property
    def is_due(self) -> bool:
        """Whether the next step is to be judged."""
        ...

    def judge(self, report: StepReport) -> Verdict:
        """Judge a step that has moved the weights: keep it, try again (with a new `region`), or give it up."""
        ...


class Snapshot:
    """Weights and the state of their optimizer.

    Attributes:
        weights: The weights as they were.

    Args:
        optimizer: The optimizer.
        parameters: The weights.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self.weights = [p.detach().clone() for p in parameters]
        self._state = _copied(optimizer.state)
        # Some optimizers keep running numbers there.
        self._settings = [{n: copy.deepcopy(v) for n, v in g.items() if n != "params"} for g in optimizer.param_groups]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, bit by bit."""
        for parameter, weight in zip(self._parameters, self.weights, strict=True):
            parameter.copy_(weight)
        self._put_back_state()
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=False):  # some may be new
            group.update(copy.deepcopy(settings))

    def state_dict(self) -> dict[str, Any]:
        """Return what would be put back, in tensors, numbers, strings, lists and dicts."""
        return {
            "weights": self.weights,
            "state": [dict(self._state.get(p, {})) for p in self._parameters],
            "settings": [{n: v for n, v in group.items() if _is_plain(v)} for group in self._settings],
        }

    @classmethod
    def from_state_dict(cls, optimizer: Optimizer, parameters: Sequence[Tensor], state: dict[str, Any]) -> Snapshot:
        """Make a snapshot of the same weights, of another process, from what `state_dict` returned."""
        snapshot = cls(optimizer, parameters)
        for weight, saved in zip(snapshot.weights, state["weights"], strict=True):
            weight.copy_(saved)
        kept = zip(parameters, state["state"], strict=True)
        snapshot._state = {p: {n: _placed(v, p) for n, v in values.items()} for p, values in kept if values}
        snapshot._settings = [dict(group) for group in state["settings"]]
        return snapshot

    def _put_back_state(self) -> None:
        """In place where it can be: after a failure for want of memory there is none for a second copy."""
        state = self._optimizer.state
        for parameter in [p for p in state if p not in self._state]:
            del state[parameter]
        for parameter, kept in self._state.items():
            values = state[parameter]
            for name in [n for n in values if n not in kept]:
                del values[name]
            for name, value in kept.items():
                values[name] = _overwritten(values.get(name), value)


@torch.no_grad()
def shorten_step_(parameters: Sequence[Tensor], before: Sequence[Tensor], factor: float) -> None:
    """Leave weights at `factor` of their way from where they were before."""
    for parameter, weight in zip(parameters, before, strict=True):
        parameter.copy_(torch.lerp(weight, parameter, factor))


def _placed(value: Any, parameter: Tensor) -> Any:
    """A number of an optimizer's state where it belongs: beside its weights, or (a count of steps) on the host."""
    is_count = not isinstance(value, Tensor) or value.ndim == 0
    return copy.deepcopy(value) if is_count else value.detach().to(parameter.device, copy=True)


def _is_plain(value: Any) -> bool:
    """Whether a value can be in a checkpoint that is read without running code."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _overwritten(present: Any, kept: Any) -> Any:
    """What was kept, in the memory of what is there now."""
    if not isinstance(kept, Tensor):
        return copy.deepcopy(kept)
    if not isinstance(present, Tensor) or (present.shape, present.dtype) != (kept.shape, kept.dtype):
        return kept.clone()
    return present.copy_(kept)


def _copied(state: Any) -> dict[Any, dict[str, Any]]:
    return {
        parameter: {name: _overwritten(None, value) for name, value in values.items()}
        for parameter, values in state.items()
    }
