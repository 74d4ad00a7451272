"""A number for each sample, the same in each epoch: random targets follow from it, stored results are found by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hamu_lightning.checks import check_type
from hamu_lightning.errors import HAMUValueError

# A function of a batch that gives a number for each of its N samples, int64 `[N]`.
Key: TypeAlias = Callable[[Any], Tensor]

# The multipliers of splitmix64 (Steele, Lea, Flood 2014) as signed numbers: integer tensors wrap round.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def as_key(key: Key | None) -> Key:
    """The key function that was given; `sample_keys` by default.

    Raises:
        HAMUValueError: If it is no function.
    """
    if key is None:
        return sample_keys
    wanted = "a function of the batch that returns a number for each sample"
    found: Key = check_type("key", key, Callable, wanted)
    return found


def mix(numbers: Tensor) -> Tensor:
    """Scramble int64 numbers one by one (the finaliser of splitmix64); the same on every device."""
    numbers = (numbers ^ _shift(numbers, 30)) * _FIRST
    numbers = (numbers ^ _shift(numbers, 27)) * _SECOND
    return numbers ^ _shift(numbers, 31)


def sample_keys(batch: Any) -> Tensor:
    """A key for each of the N samples of a batch, int64 `[N]`, from the bits of all its tensors of length N.

    The same sample has the same key in every batch, epoch and process, as long as its tensors are the same: randomly
    augmented it is another sample, and so it is padded to another length, unless an `attention_mask` `[N, T]` of the
    same mapping says what is padding.

    Raises:
        HAMUValueError: If there is no tensor in the batch.

    Example:
        >>> keys = sample_keys((torch.tensor([[1.0], [2.0], [1.0]]), torch.tensor([0, 1, 0])))
        >>> bool(keys[0] == keys[2]), bool(keys[0] == keys[1])
        (True, False)
    """
    leaves = [(leaf, mask) for leaf, mask in _masked_tensors_in(batch) if leaf.dim()]
    if not leaves:
        raise HAMUValueError(
            f"Expected a batch with tensors, to tell its samples apart, but got a {type(batch).__name__} without. "
            "Pass `key=`, a function of the batch that returns a number for each sample."
        )
    first, _ = leaves[0]
    keys = torch.zeros(len(first), dtype=torch.int64, device=first.device)
    for number, (leaf, mask) in enumerate(leaves, start=1):
        if len(leaf) == len(first):
            keys = mix(keys + _sum_up(_bits_of(leaf.detach()).reshape(len(leaf), -1), mask, number))
    return keys


def _sum_up(bits: Tensor, mask: Tensor | None, number: int) -> Tensor:
    """One number for each row of `[N, T]`, that of the bits and their places; counted from where the mask begins."""
    places = torch.arange(bits.shape[1], device=bits.device)
    if mask is not None:
        places = places - mask.long().argmax(1, keepdim=True)
    mixed = mix(bits ^ mix((places + number * 2**40) * _STEP))
    return mixed.sum(1) if mask is None else torch.where(mask, mixed, 0).sum(1)


def draw_below(bound: int, keys: Tensor, seed: int) -> Tensor:
    """A number in [0, bound) for each key, int64, as random as `mix`; follows from key and seed alone."""
    offset = mix(torch.full_like(keys, seed) * _STEP + _STEP)
    return torch.remainder(_shift(mix(keys ^ offset), 1), bound)


def draw_places(bound: int, keys: Tensor, places: int, seed: int) -> Tensor:
    """The same for each of a sample's places: keys `[N]` give `[N, places]`."""
    numbers = torch.arange(places, device=keys.device) * _STEP
    return draw_below(bound, mix(keys.unsqueeze(1) + numbers), seed)


def _masked_tensors_in(batch: Any, mask: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """All tensors of a nested batch, in order, and where there is no padding in them, bool `[N, T]`."""
    if isinstance(batch, Tensor):
        yield batch, mask if mask is not None and mask.shape == batch.shape else None
    elif isinstance(batch, Mapping):
        found = batch.get("attention_mask")
        own = found.bool() if isinstance(found, Tensor) and found.dim() == 2 else None
        for part in batch.values():
            yield from _masked_tensors_in(part, own)
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from _masked_tensors_in(part, mask)


def _shift(numbers: Tensor, bits: int) -> Tensor:
    """Shift to the right and fill with zeros; `>>` would fill with the sign."""
    return torch.bitwise_and(numbers >> bits, 2 ** (64 - bits) - 1)


def _bits_of(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point():
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        tensor = tensor.contiguous().view(integers[tensor.element_size()])
    return tensor.long()
