"""Whose run a checkpoint's state is: an identity of the data of each group, which holds no data."""

from __future__ import annotations

import copy
import hashlib
import random
import secrets
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from hamu_lightning.randomness import RandomStream

# Of each set so many samples are read, twice each. The digest has a byte for each: what is known of one sample does not
# tell it from a 256th of all others.
_READ = 4
# Containers with more entries are copied, but not what they hold.
_MANY = 64


def identify(sources: Mapping[str, Any], protected: Iterable[str], salt: str | None = None) -> dict[str, Any]:
    """Describe the data of each group, so that the same data can be recognised.

    Compared are the number of samples, the indices of subsets and samplers, and a few samples, together in one short
    salted digest; where samples cannot be read (streams, own iterables, datasets that raise or draw from generators of
    their own), the sizes alone. Reading leaves no trace in random states and in the dataset's attributes.

    Args:
        sources: What brings the batches of each group, as one process would read it.
        protected: Which of them are protected.
        salt: That of the identity to compare with; default: a new one.

    Returns:
        The salt, and for each group its role, its size and its digest, in strings and numbers.
    """
    salt = secrets.token_hex(16) if salt is None else salt
    kept = set(protected)
    groups = {
        name: {"role": "protect" if name in kept else "forget", **_describe(source, bytes.fromhex(salt))}
        for name, source in sources.items()
    }
    return {"salt": salt, "groups": groups}


def is_same_run(saved: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
    """Whether a run with the present data can go on with a saved state.

    That is: something that is to be forgotten is in both, and no name stands for other data or another role. What is
    not known on one side is not compared.
    """
    before, now = saved["groups"], present["groups"]
    shared = [(before[name], now[name]) for name in before if name in now]
    is_known = any(a["role"] == "forget" for a, _ in shared)
    return is_known and all(
        a.get(key) == b.get(key) for a, b in shared for key in a if None not in (a.get(key), b.get(key))
    )


def is_same_request(saved: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
    """Whether two identities are surely of the same data in the same roles: nothing in them is unknown or differs."""
    known = all(None not in group.values() for group in saved["groups"].values())
    return known and saved["groups"] == present["groups"]


def _describe(source: Any, salt: bytes) -> dict[str, Any]:
    parts = getattr(source, "loaders", (source,))
    sizes = [_size(part) for part in parts]
    return {
        "size": None if None in sizes else sum(size for size in sizes if size is not None),
        "digest": _digest(parts, salt),
    }


def _size(loader: Any) -> int | None:
    """The number of samples that a loader draws in a pass; of other iterables that of batches; None if not known."""
    is_batched = isinstance(loader, DataLoader) and isinstance(loader.batch_sampler, BatchSampler)
    try:
        return len(loader.sampler if is_batched else loader)
    except (TypeError, NotImplementedError):
        return None


def _digest(loaders: Sequence[Any], salt: bytes) -> str | None:
    """A short digest of all that can be read; None where a sample cannot be, or is another one at each reading."""
    digest, count = hashlib.blake2b(key=salt), 0
    try:
        with RandomStream(0).active(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for loader in loaders:
                data, positions = _open(loader)
                if data is None:
                    return None
                for indices in _index_lists(loader):
                    digest.update(np.asarray(indices, dtype=np.int64).tobytes())
                for position in positions:
                    first, second = (_hash(data, position) for _ in range(2))
                    if first != second:
                        return None
                    digest.update(first)
                count += len(positions)
    except Exception:  # other people's datasets may raise anything
        return None
    return digest.hexdigest()[: 2 * min(count, _READ)] or None


def _open(loader: Any) -> tuple[Any, list[int]]:
    """What can be read by position, copied as far as reading may change it, and the positions to read."""
    data = loader.dataset if isinstance(loader, DataLoader) else loader
    if isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return None, []
    chosen = _sampler_indices(loader)
    size = len(data) if chosen is None else len(chosen)
    steps = min(size, _READ)
    spread = [round(i * (size - 1) / max(steps - 1, 1)) for i in range(steps)]
    return _twin(data), spread if chosen is None else [int(chosen[i]) for i in spread]


def _index_lists(loader: Any) -> list[Any]:
    """The indices of the sampler and of the subsets behind a loader."""
    found, data = [_sampler_indices(loader)], getattr(loader, "dataset", None)
    while data is not None:
        found.append(getattr(data, "indices", None))
        data = getattr(data, "dataset", None)
    return [indices for indices in found if isinstance(indices, Sequence | np.ndarray | Tensor | range)]


def _sampler_indices(loader: Any) -> Any:
    """The positions that a sampler chooses from; None for all."""
    return getattr(getattr(loader, "sampler", None), "indices", None)


def _hash(data: Any, position: int) -> bytes:
    """A hash of a sample: of its tensors, arrays, numbers and strings, and of the types of what else it holds."""
    RandomStream(0).reseed()  # inside of an active one: both readings draw alike
    digest = hashlib.blake2b()
    leaves, structure = tree_flatten(data[position])
    for leaf in (str(structure), *leaves):
        array = leaf.detach().cpu().to_dense() if isinstance(leaf, Tensor) else leaf
        if isinstance(array, Tensor):
            content = array.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        elif isinstance(array, np.ndarray | np.generic) or type(array).__module__.startswith("PIL."):
            content = np.asarray(array).tobytes()
        else:
            content = repr(array).encode() if isinstance(array, str | bytes | bool | int | float | None) else b""
        form = getattr(leaf, "dtype", ""), [*getattr(leaf, "shape", ())], len(content)
        digest.update(f"{type(leaf).__qualname__} {form} ".encode() + content)
    return digest.digest()


def _twin(value: Any, known: dict[int, Any] | None = None) -> Any:
    """A copy in which attributes, containers and generators are new, and the data is the same."""
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)]
    made: Any = value
    if isinstance(value, torch.Generator):
        made = torch.Generator(value.device)
        made.set_state(value.get_state())
    elif isinstance(value, np.random.Generator | np.random.RandomState | random.Random):
        made = copy.deepcopy(value)
    elif type(value) in (dict, list, set, deque):
        made = known[id(value)] = value.copy()
        if isinstance(made, dict | list) and len(made) <= _MANY:
            for key, entry in [*made.items()] if isinstance(made, dict) else [*enumerate(made)]:
                made[key] = _twin(entry, known)
    elif _is_plain_object(value):
        made = known[id(value)] = object.__new__(type(value))
        made.__dict__.update({name: _twin(entry, known) for name, entry in vars(value).items()})
    known[id(value)] = made
    return made


def _is_plain_object(value: Any) -> bool:
    """Whether attributes are all that there is to an object, so that a copy needs no code of its own."""
    kind = type(value)
    if not hasattr(value, "__dict__") or kind.__module__ == "builtins" or isinstance(value, type | nn.Module):
        return False
    own = ("__new__", "__copy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")
    return all(getattr(kind, name, None) is getattr(object, name, None) for name in own)
