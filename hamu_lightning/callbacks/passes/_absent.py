"""Data stays out of pickles: what stands in its place, and the objects that hold data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import context
from typing import Any, ClassVar

from typing_extensions import Self


@dataclass(frozen=True)
class AbsentData:
    """Stands for data that was left out of a pickle.

    Args:
        description: What it was, in words, without a sample.
    """

    description: str

    @classmethod
    def of(cls, data: Any) -> Any:
        """What stands for this data; of named data, for each of them."""
        if data is None or isinstance(data, AbsentData):
            return data
        if isinstance(data, Mapping):
            return {name: cls.of(part) for name, part in data.items()}
        try:
            return cls(f"{type(data).__name__} of length {len(data)}")
        except (TypeError, NotImplementedError):
            return cls(type(data).__name__)


class HoldsData:
    """An object whose copies hold its data, and whose pickles do not: those go into files and logs.

    Processes that are being spawned get the data: they go on with the same fit.
    """

    _data: ClassVar[tuple[str, ...]] = ()

    def __getstate__(self) -> dict[str, Any]:
        """What goes into a pickle."""
        is_spawning = context.get_spawning_popen() is not None
        hidden = {} if is_spawning else {name: AbsentData.of(getattr(self, name)) for name in self._data}
        return {**self.__dict__, **hidden}

    def __copy__(self) -> Self:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made
