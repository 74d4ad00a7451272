"""Parts a Dataset: what is retained, what each request wants forgotten, and what is held out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset, IterableDataset, Subset

from hamu_lightning.callbacks.passes import count_shared_samples
from hamu_lightning.data._columns import read_spellings
from hamu_lightning.data._ids import Ids
from hamu_lightning.data._loaders import Sieve
from hamu_lightning.data._requests import Found, Index, count_overlaps, find_by_predicate, show
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.loaders import length_of
from hamu_lightning.wording import count

Wish: TypeAlias = "Ids | Callable[[Any], Any]"


@dataclass(frozen=True)
class Parting:
    """The parts of a Dataset.

    Attributes:
        retain: What is trained on.
        forget: What is to be forgotten, of all requests together.
        requests: The same of each request.
        holdout: Of what was never trained on, where samples of the Dataset were named.
        names: For the place of each sample in `forget` the id that it was found by, and of several requests also for
            the name of the request and the place in it; empty for a stream.
    """

    retain: Any
    forget: Any
    requests: Mapping[str, Any]
    holdout: Any
    names: Mapping[Any, Hashable]


def part(dataset: Any, requests: Mapping[str, Wish], holdout: Wish | None, by: Any, strict: bool) -> Parting:
    """Part a Dataset.

    Args:
        dataset: The training data.
        requests: What each request wants forgotten.
        holdout: Samples that were never trained on.
        by: What ids are.
        strict: Whether ids that no sample has are an error.

    Raises:
        HAMUValueError: If that cannot be done.
    """
    if length_of(dataset) is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return _part_stream(dataset, requests, holdout)
    size = length_of(dataset) or 0
    finder = _Finder(dataset, by, size)
    found = {name: finder.find(wish) for name, wish in requests.items()}
    _tell_faults(found, strict, by)
    for (one, other), n in count_overlaps(found).items():
        rank_zero_warn(f"The requests {one!r} and {other!r} share {count(n, 'sample')}.")
    ids = {place: value for request in found.values() for place, value in request.ids.items()}
    forgotten = sorted(ids)
    held = {} if holdout is None else finder.find(holdout).ids
    if held.keys() & ids.keys():
        raise HAMUValueError(
            f"Expected no sample both in `forget` and in `holdout`, but got {len(held.keys() & ids.keys())}. "
            "What was never trained on cannot be forgotten."
        )
    retained = [place for place in range(size) if place not in ids and place not in held]
    _tell_copies(dataset, forgotten, retained)
    if not forgotten or not retained:
        raise HAMUValueError(
            f"Expected some samples to forget and some to retain, but got {len(forgotten)} of {size} to forget."
        )
    own = len({*ids.values()})
    of = f", those of {count(own, 'id')}," if own < len(ids) else ""
    rank_zero_info(
        f"UnlearnData: {len(forgotten)} of {size} samples{of} are to be forgotten, {len(retained)} are retained."
    )
    return Parting(
        Subset(dataset, retained),
        Subset(dataset, forgotten),
        {name: Subset(dataset, [*request.ids]) for name, request in found.items()},
        Subset(dataset, sorted(held)) if held else None,
        {place: ids[position] for place, position in enumerate(forgotten)} | _name_each(found),
    )


def _name_each(requests: Mapping[str, Found]) -> dict[tuple[str, int], Hashable]:
    """Of several requests for each and the place of a sample in it the id."""
    several = requests if len(requests) > 1 else {}
    return {(name, place): own for name, request in several.items() for place, own in enumerate(request.ids.values())}


def count_named(dataset: Any, wishes: Sequence[Ids], by: Any) -> int:
    """How many samples of another Dataset have ids of requests, as far as it can be seen."""
    if not isinstance(by, str | int) or length_of(dataset) is None or not hasattr(dataset, "__getitem__"):
        return 0
    with suppress(HAMUValueError):  # it has no such column
        finder = _Finder(dataset, by, length_of(dataset) or 0)
        return len({place for wish in wishes for place in finder.find(wish).ids})
    return 0


class _Finder:
    """Finds samples; the index of all ids is made once, if it is needed."""

    def __init__(self, dataset: Any, by: Any, size: int) -> None:
        self._dataset, self._by, self._size = dataset, by, size
        self._index: Index | None = None

    def find(self, wish: Wish) -> Found:
        if not isinstance(wish, Ids):
            return find_by_predicate(self._dataset, wish, self._size)
        if self._index is None:
            self._index = Index(read_spellings(self._dataset, self._by), self._size)
        return self._index.find(wish)


def _tell_faults(found: Mapping[str, Found], strict: bool, by: Any) -> None:
    for name, request in found.items():
        if request.has_header:
            rank_zero_info(
                f"The first line of {name!r} is the id of no sample, and so taken for the name of the column."
            )
        if request.repeated:
            ids = count(request.repeated, f"id of {name!r} was", f"ids of {name!r} were")
            rank_zero_warn(f"{ids} given more than once; each is taken once.")
        if not request.missing:
            continue
        what = "positions" if by is None else f"ids by {by!r}" if isinstance(by, str | int) else "ids"
        told = (
            f"all {what} of {name!r} to be in the training data, but {count(len(request.missing), 'is', 'are')} not: "
        )
        told += show(request.missing)
        if strict or not request.ids:
            cure = (
                "If they are rightly absent, go on with the others: UnlearnData(..., missing='warn'), of the command "
            )
            cure += "`--missing warn`."
            cure = cure if by is not None else "Positions count from 0; other ids need `by`, the name of their column."
            raise HAMUValueError(f"Expected {told}. {cure}")
        rank_zero_warn(f"Expected {told}. The others are to be forgotten.")


def _tell_copies(dataset: Any, forgotten: list[int], retained: list[int]) -> None:
    """Warn where what is retained holds the same samples once more, as in a union of subsets that overlap."""
    copies = count_shared_samples(Subset(dataset, forgotten), Subset(dataset, retained))
    if copies:
        rank_zero_warn(
            f"{copies} of the samples to forget {'stands' if copies == 1 else 'stand'} in the training data more than "
            "once, and the other places are retained: they are trained on again. Give all places, or ids of `by`, "
            "which are found wherever they are."
        )


def _part_stream(dataset: Any, requests: Mapping[str, Wish], holdout: Wish | None) -> Parting:
    wishes = [*requests.values(), *([] if holdout is None else [holdout])]
    if any(isinstance(wish, Ids) for wish in wishes):
        raise HAMUValueError(
            f"Expected a function that is true for a sample to forget, since {type(dataset).__name__} is a stream, but "
            "got ids. Give UnlearnData(data, forget=lambda sample: sample[...] in ids); a pass reads all of it."
        )
    chosen: list[Any] = [*requests.values()]

    def is_forgotten(sample: Any) -> bool:
        return any(bool(wish(sample)) for wish in chosen)

    def is_apart(sample: Any) -> bool:
        return is_forgotten(sample) or (callable(holdout) and bool(holdout(sample)))

    named = {name: Sieve(dataset, wish, is_forgotten=True) for name, wish in requests.items()}  # type: ignore[arg-type]
    held: Dataset[Any] | None = Sieve(dataset, holdout, is_forgotten=True) if callable(holdout) else None
    return Parting(Sieve(dataset, is_apart, False), Sieve(dataset, is_forgotten, True), named, held, {})
