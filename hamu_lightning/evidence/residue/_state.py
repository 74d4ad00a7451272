"""What of the state of a HAMUCallback still remembers, and the state without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

REFERENCE = "weights of a reference from before unlearning"
KEPT = "weights of an earlier step"
LOSSES = "losses of single samples"
TABLES = "sorted log-odds of single samples"
STATE_KEY = "HAMUCallback"


def strip(state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a state without what remembers, and the kinds of what was there.

    A fit goes on from it as from one that has ended: an objective with a reference asks for the original then, and what
    was measured before the first step is measured anew.

    Args:
        state: What `HAMUCallback.state_dict` returned. It is left as it is.

    Example:
        >>> strip({"guard": {"kept": {"weights": [1.0]}, "returns": 0}})
        ({'guard': {'kept': {}, 'returns': 0}}, ['weights of an earlier step'])
    """
    found: dict[str, None] = {}

    def walk(name: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        kind = _kind(name, value)
        if kind is None:
            return {key: walk(key, inner) for key, inner in value.items()}
        found[kind] = None
        # As `FrozenCopy.final_state_dict` has it.
        return {"released": True} if kind == REFERENCE else {}

    return walk("", state), list(found)


def _kind(name: str, value: Mapping[str, Any]) -> str | None:
    # The content tells: users name groups as they like.
    match name, value:
        case "reference", {"weights": Mapping()}:
            return REFERENCE
        case "kept", {"weights": list()}:
            return KEPT
        case "evidence", {"before": Mapping() as before} if before:
            return LOSSES
        case _, {"keys": Tensor(), "has_samples": bool()}:
            return TABLES
    return None
