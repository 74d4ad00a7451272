"""Whether forget and held-out samples go through the same transforms, and a view of the ones as the others go."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.randomness import RandomStream

# What Datasets call their transforms: torchvision's have all three.
_NAMES = ("transform", "transforms", "target_transform")
# So many samples of a set are read twice.
_READ = 4
_CURE = (
    'Give both the same transforms: `transform_like="holdout"` in the target, as in Unseen(data, '
    'transform_like="holdout"), for a forget set without its augmentation; or views of the data without it.'
)


def explain_difference(forget: Any, held_out: Any, name: str = "held-out data of the target", cure: str = _CURE) -> str:
    """Why losses of two sets do not compare, in words with the cure; empty where nothing speaks against it.

    Args:
        forget: The loader or Dataset of what is to be forgotten.
        held_out: That of the held-out data.
        name: What the held-out data are called.
        cure: What to do.
    """
    ours, theirs = _transforms_of(forget), _transforms_of(held_out)
    if ours is not None and theirs is not None:
        if _are_alike(ours, theirs):
            return ""  # augmentation, if any, is on both sides
        return f"The forget set and the {name} go through different transforms. {cure}"
    changing = [name for name, data in (("forget set", forget), ("held-out data", held_out)) if _changes(data)]
    if len(changing) != 1:
        return ""
    return f"A sample of the {changing[0]} gives other tensors at each reading, one of the other data does not. {cure}"


def with_transforms_of(data: Any, like: Any, what: str = "held-out data") -> Any:
    """A view of a loader or Dataset whose samples go through the transforms of another one.

    Args:
        data: It stays as it is: what holds a transform is copied, and shares the samples.
        like: A loader or Dataset.
        what: What the first one is; the other of "held-out data" and "forget set" is what it is made alike.

    Raises:
        HAMUValueError: If one of them has no attribute `transform`.
    """
    wanted = _transforms_of(like)
    if wanted is None or _transforms_of(data) is None:
        other = "forget set" if what == "held-out data" else "held-out data"
        raise HAMUValueError(
            f"Expected Datasets with an attribute `transform` for `transform_like`, but that of the "
            f"{other if wanted is None else what} has none, or several. Give the {what} with the transforms of the "
            f"{other}, and leave `transform_like` out."
        )
    return _dressed(data, wanted)


def _dressed(data: Any, transforms: dict[str, Any]) -> Any:
    twin = copy.copy(data)
    if isinstance(data, ConcatDataset):
        twin.datasets = [_dressed(part, transforms) for part in data.datasets]
    elif _inner(data) is not None:
        # Not by assignment, which DataLoader forbids.
        twin.__dict__.update(dataset=_dressed(data.dataset, transforms))
        twin.__dict__.update({"_iterator": None} if isinstance(data, DataLoader) else {})
    else:
        vars(twin).update({name: value for name, value in transforms.items() if name in vars(twin)})
    return twin


def _inner(data: Any) -> Any:
    """The Dataset behind a loader or a Subset."""
    return data.dataset if isinstance(data, DataLoader | Subset) else None


def _transforms_of(data: Any) -> dict[str, Any] | None:
    """The transforms of the one Dataset behind some data, by attribute; None where it has none, or they differ."""
    if _inner(data) is not None:
        return _transforms_of(_inner(data))
    if isinstance(data, ConcatDataset):
        found = [_transforms_of(part) for part in data.datasets]
        known = [one for one in found if one is not None]
        is_one = len(known) == len(found) and all(_are_alike(known[0], other) for other in known)
        return known[0] if known and is_one else None
    held = getattr(data, "__dict__", {})
    return {name: held[name] for name in _NAMES if name in held} if "transform" in held else None


def _are_alike(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    names = ours.keys() & theirs.keys() - {"target_transform"}
    return all(ours[n] is theirs[n] or repr(ours[n]) == repr(theirs[n]) for n in names)


def _changes(data: Any) -> bool:
    """Whether a sample of a set gives other tensors at a second reading; False where it cannot be read."""
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Dataset | Sequence):
        return False
    try:
        with RandomStream(0).active():
            step = max(1, len(dataset) // _READ)  # type: ignore[arg-type]
            return any(not _same(dataset[i], dataset[i]) for i in range(0, len(dataset), step))  # type: ignore[arg-type]
    except Exception:  # other people's datasets may raise anything
        return False


def _same(one: Any, other: Any) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs if isinstance(a, Tensor | np.ndarray)
    )
