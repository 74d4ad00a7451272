"""The user's own training loader over a part of its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from typing_extensions import override

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.loaders import batch_size_of, load_like


class Sieve(IterableDataset[Any]):
    """The samples of a stream that a function chooses.

    Args:
        stream: The stream; each pass reads all of it.
        predicate: True for a sample that is to be forgotten.
        is_forgotten: Whether those are the samples, or the others.
    """

    def __init__(self, stream: Any, predicate: Callable[[Any], Any], is_forgotten: bool) -> None:
        self._stream, self._predicate, self._is_forgotten = stream, predicate, is_forgotten

    @override
    def __iter__(self) -> Iterator[Any]:
        return (sample for sample in self._stream if bool(self._predicate(sample)) is self._is_forgotten)

    def set_epoch(self, epoch: int) -> None:
        """Tell the stream which pass begins, if it wants to know."""
        tell = getattr(self._stream, "set_epoch", None)
        if callable(tell):
            tell(epoch)


def check_is_one_loader(source: Any) -> None:
    """Raise unless a training loader is one DataLoader.

    Raises:
        HAMUValueError: Otherwise.
    """
    if not isinstance(source, DataLoader):
        raise HAMUValueError(
            f"Expected one DataLoader for training, but `train_dataloader()` gives {type(source).__name__}: which "
            "samples the ids mean cannot be told. Split its data with split_forget(dataset, positions), and give "
            "HAMUCallback(forget=...)."
        )


def load_retained(loader: DataLoader[Any], part: Subset[Any]) -> DataLoader[Any]:
    """Return a training loader over what is retained, otherwise as it is: its size of batches, sampler, workers.

    Args:
        loader: The user's.
        part: A part of its Dataset.

    Raises:
        HAMUValueError: If its sampler cannot be made for a part.
    """
    options: dict[str, Any] = {"generator": loader.generator, "in_order": getattr(loader, "in_order", True)}
    if loader.batch_sampler is None:  # samples are ready batches
        return load_like(part, loader, batch_size=None, sampler=_sample_part(loader.sampler, part), **options)
    batches: Any = loader.batch_sampler
    if type(batches) is not BatchSampler:
        raise _refuse("batch_sampler", batches)
    options |= {"batch_size": batches.batch_size, "drop_last": batches.drop_last}
    return load_like(part, loader, sampler=_sample_part(batches.sampler, part), **options)


def _sample_part(sampler: Any, part: Subset[Any]) -> Iterable[int] | None:
    """The same sampler for a part; None for the order of the data.

    Raises:
        HAMUValueError: If it is of a kind that is not known, or draws nothing of the part.
    """
    kind, size, total = type(sampler), len(part), len(part.dataset)  # type: ignore[arg-type]
    if kind is SequentialSampler:
        return None if len(sampler) == total else _keep(range(len(sampler)), part)
    if kind is RandomSampler and len(sampler.data_source) == total:
        return RandomSampler(part, sampler.replacement, sampler._num_samples, sampler.generator)
    if kind is RandomSampler and not sampler.replacement and sampler._num_samples is None:
        return SubsetRandomSampler(_keep(range(len(sampler)), part), sampler.generator)
    if kind is SubsetRandomSampler:
        return SubsetRandomSampler(_keep(sampler.indices, part), sampler.generator)
    if kind is WeightedRandomSampler:
        is_pass = sampler.num_samples == len(sampler.weights)
        weights = torch.zeros(total, dtype=sampler.weights.dtype)
        weights[: len(sampler.weights)] = sampler.weights
        weights = weights[torch.as_tensor(part.indices)]
        _check_draws(bool(weights.any()))
        number = size if is_pass else sampler.num_samples
        number = number if sampler.replacement else min(number, int(weights.count_nonzero()))
        return WeightedRandomSampler(weights.tolist(), number, sampler.replacement, sampler.generator)
    if kind is DistributedSampler and len(sampler.dataset) == total:
        return DistributedSampler(
            part, sampler.num_replicas, sampler.rank, sampler.shuffle, sampler.seed, sampler.drop_last
        )
    raise _refuse("sampler", sampler)


def _keep(positions: Iterable[Any], part: Subset[Any]) -> list[int]:
    """Where positions in the whole are in a part, as far as they are there."""
    places = {int(position): place for place, position in enumerate(part.indices)}
    kept = [places[int(position)] for position in positions if int(position) in places]
    _check_draws(bool(kept))
    return kept


def _check_draws(draws: bool) -> None:
    if not draws:
        raise HAMUValueError(
            "Expected the sampler of the training loader to draw some of what is retained, but all that it draws is to "
            "be forgotten. Say how the retained data are loaded: UnlearnData(..., make_loader=lambda dataset: "
            "DataLoader(dataset, batch_size=64, shuffle=True))."
        )


def _refuse(name: str, sampler: Any) -> HAMUValueError:
    return HAMUValueError(
        f"Expected a `{name}` of torch's own in the training loader, which can be made for a part of its data, but got "
        f"{type(sampler).__name__}. Say how the retained data are loaded: UnlearnData(..., make_loader=lambda dataset: "
        f"DataLoader(dataset, {name}=...))."
    )


def load_in_order(dataset: Dataset[Any], loader: DataLoader[Any], **options: Any) -> DataLoader[Any]:
    """Return a loader of other data without a shuffle, by default in batches as those of training."""
    return load_like(dataset, loader, **{"batch_size": batch_size_of(loader, 1), **options})
