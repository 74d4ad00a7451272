"""The tensors and arrays of a module, looked at all together: which of them a pass has written to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from hamu_lightning.callbacks.passes._saved import Mark, SavedArray, SavedTensor

_version, _address = attrgetter("_version"), methodcaller("data_ptr")


class Part(NamedTuple):
    """A tensor or an array of a module, where it hangs, whether it is saved, and how it looked."""

    place: tuple[int, Any]
    data: SavedTensor | SavedArray
    is_kept: bool
    mark: Mark


class Together:
    """Saves the parts of a module again, as often as it takes.

    The saved tensors in host memory are copied one after the other into one vector for each dtype: two calls say
    whether one of a hundred buffers has changed. Of tensors that are not saved, address and version counter say it.

    Args:
        parts: What there is.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self._copied: dict[torch.dtype, list[Part]] = {}
        self._watched: list[Part] = []
        self._others: list[Part] = []
        for part in parts:
            if not isinstance(part.data, SavedTensor) or (part.is_kept and not _is_usual(part.data.tensor)):
                self._others.append(part)
            elif part.is_kept:
                self._copied.setdefault(part.data.tensor.dtype, []).append(part)
            else:
                self._watched.append(part)
        self._seen = [*(part for parts in self._copied.values() for part in parts), *self._watched]
        self._tensors = [part.data.tensor for part in self._seen if isinstance(part.data, SavedTensor)]
        self._unsaved = self._tensors[len(self._tensors) - len(self._watched) :]
        self._copies: dict[torch.dtype, Tensor] = {}
        self._addresses: list[int] = []
        self._versions: list[int] = []

    def renew(self) -> bool:
        """Save the present contents; return whether that could be done."""
        addresses = [*map(_address, self._tensors)]
        if addresses != self._addresses:
            for part in self._seen:
                assert isinstance(part.data, SavedTensor)
                part.data.settle()
        self._addresses, self._versions = addresses, [*map(_version, self._unsaved)]
        self._copies = {dtype: _flatten(parts) for dtype, parts in self._copied.items()}
        self._others = [
            part._replace(mark=None if part.is_kept else part.data.mark(is_thorough=False)) for part in self._others
        ]
        return all(part.data.save(is_on_host=False) for part in self._others if part.is_kept)

    def changed(self) -> Iterator[Part]:
        """Those that may have changed since, with what was saved of them."""
        has_moved = [*map(_address, self._tensors)] != self._addresses
        for dtype, parts in self._copied.items():
            if has_moved or not torch.equal(_flatten(parts), self._copies[dtype]):
                tensors = [part.data.tensor for part in parts if isinstance(part.data, SavedTensor)]
                copies = _unflatten_dense_tensors(self._copies[dtype], tensors)  # type: ignore[no-untyped-call]
                for part, copy in zip(parts, copies, strict=True):
                    assert isinstance(part.data, SavedTensor)
                    part.data.put(copy)
                    yield part
        if has_moved or [*map(_version, self._unsaved)] != self._versions:
            addresses = self._addresses[len(self._addresses) - len(self._watched) :]
            for part, address, version in zip(self._watched, addresses, self._versions, strict=True):
                assert isinstance(part.data, SavedTensor)
                yield part._replace(mark=(address, tuple(part.data.tensor.shape), version))
        yield from self._others


def _flatten(parts: Iterable[Part]) -> Tensor:
    tensors = [part.data.tensor.detach() for part in parts if isinstance(part.data, SavedTensor)]
    flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return flat


def _is_usual(tensor: Tensor) -> bool:
    """Whether its contents can be copied beside others': those of another device are not compared, which reads them."""
    is_dense = tensor.layout is torch.strided and not tensor.is_quantized
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu and is_dense
