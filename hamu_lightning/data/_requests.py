"""Which samples the ids of a request mean."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from hamu_lightning.data._columns import Spellings
from hamu_lightning.data._ids import Ids, other_key
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.randomness import RandomStream

_SHOWN = 5


@dataclass(frozen=True)
class Found:
    """The samples of a request.

    Attributes:
        ids: For the position of each sample, in ascending order, the id that it was found by.
        missing: Ids that no sample has.
        repeated: How many ids were given more than once.
        has_header: Whether the first one was taken for the name of a column.
    """

    ids: dict[int, Hashable]
    missing: list[Hashable]
    repeated: int = 0
    has_header: bool = False


class Index:
    """Finds samples by ids.

    Args:
        spellings: What the samples may be called.
        size: How many there are.
    """

    def __init__(self, spellings: Spellings, size: int) -> None:
        self._size, self._is_by_position = size, isinstance(spellings[0], range)
        self._places: dict[Hashable, list[int]] = {}
        columns = [] if self._is_by_position else spellings
        for column in reversed(columns):  # the first spelling wins
            own: dict[Hashable, list[int]] = {}
            for place, key in enumerate(column):
                if key is not None:
                    own.setdefault(key, []).append(place)
            self._places |= own

    def find(self, ids: Ids) -> Found:
        """Find the samples of these ids."""
        values = ids.values
        if self._is_by_position and all(isinstance(value, bool) for value in values):
            return self._read_mask(values)
        has_header = ids.may_begin_with_header and not self._look_up(values[0]) and len(values) > 1
        values = values[has_header:]
        once = [*dict.fromkeys(values)]
        places = {value: self._look_up(value) for value in once}
        found = {place: value for value, some in places.items() for place in some}
        missing = [value for value, some in places.items() if not some]
        repeated = len(values) - len(once)
        return Found({place: found[place] for place in sorted(found)}, missing, repeated, has_header)

    def _look_up(self, value: Hashable) -> list[int]:
        if self._is_by_position:
            place = other_key(value) if isinstance(value, str) else value
            return [place] if isinstance(place, int) and 0 <= place < self._size else []
        # Both: the Datasets of a union may write their ids one as numbers, the other as text.
        return [place for key in {value, other_key(value)} for place in self._places.get(key, ())]

    def _read_mask(self, values: list[Hashable]) -> Found:
        if len(values) != self._size:
            raise HAMUValueError(
                f"Expected a mask with one of True and False for each of the {self._size} samples, but got "
                f"{len(values)}. Positions are integers."
            )
        return Found({place: place for place, is_chosen in enumerate(values) if is_chosen}, [])


def find_by_predicate(dataset: Any, predicate: Callable[[Any], Any], size: int) -> Found:
    """Find the samples for which a function is true; each is read once."""
    with RandomStream(0).active():  # augmentation may draw
        chosen = [place for place in range(size) if bool(predicate(dataset[place]))]
    return Found({place: place for place in chosen}, [])


def show(ids: list[Hashable]) -> str:
    """Some ids in words."""
    shown = ", ".join(str(value) for value in ids[:_SHOWN])
    return shown + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")


def count_overlaps(requests: Mapping[str, Found]) -> dict[tuple[str, str], int]:
    """How many samples each two requests share, where they do."""
    names = [*requests]
    pairs = {
        (a, b): len(requests[a].ids.keys() & requests[b].ids.keys()) for i, a in enumerate(names) for b in names[:i]
    }
    return {pair: n for pair, n in pairs.items() if n}
