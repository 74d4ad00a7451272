"""Finds the loader of a group: an argument, a dataset, `forget_dataloader()`, or a paired training loader."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hamu_lightning.callbacks import _compat_loaders
from hamu_lightning.callbacks._refusal import HAMUMisconfigurationError
from hamu_lightning.callbacks.passes._overlap import count_shared_samples
from hamu_lightning.loaders import batch_size_of, even_batch_size, length_of, load_like
from hamu_lightning.rules import Rule
from hamu_lightning.wording import count

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# A forget batch of a fit with a target is as large as the set, up to this.
_LARGE = 256


def find_loader(
    trainer: Trainer,
    name: str,
    source: Any,
    batch_size: int | None,
    *,
    is_forgotten: bool = True,
    leads_to_target: bool = False,
) -> Iterable[Any] | None:
    """Return the loader of a group, as one process would read it, or None where the training loader brings its batches.

    Args:
        trainer: The trainer, with its training loader set up.
        name: The name of the group.
        source: What the user gave: a DataLoader or another iterable of batches, a Dataset, or None.
        batch_size: For a Dataset; default: the training loader's.
        is_forgotten: Whether the group is to be forgotten, so that the retain stream should not hold its samples.
        leads_to_target: Whether a target is to be reached on it. The default for a Dataset is then all of it in one
            batch, or in equal ones of up to 256 samples, over all processes: what a step promises on a few samples does
            not hold for the others.

    Raises:
        HAMUMisconfigurationError: If nothing was found, or it is empty.
    """
    train = _compat_loaders.train_loader_parts(trainer)
    if source is None:
        source = _call_hook(trainer, name)
    source = _compat_loaders.without_indices(source)
    if source is None:
        if isinstance(train, Mapping) and {"retain", name} <= set(train):
            return None
        raise HAMUMisconfigurationError(
            f"Expected to find the data of {name!r}, but none was passed, neither the module nor the datamodule has a "
            f"`forget_dataloader()`, and the training loader does not yield {{'retain': ..., {name!r}: ...}}. "
            "Pass HAMUCallback(forget=loader_or_dataset, ...)."
        )
    check_can_be_read(name, source)
    is_dataset = is_data(source)
    if batch_size is not None and not is_dataset:
        raise HAMUMisconfigurationError(
            f"Expected `batch_size` to go with a Dataset, but {name!r} is a {type(source).__name__}, which has its own "
            "batch size. Set it there."
        )
    check_not_empty(source)
    if is_dataset and batch_size is None and leads_to_target:
        batch_size = _choose_batch_size(trainer, source, train)
    loader = _build_loader(source, train, batch_size) if is_dataset else source
    check_not_empty(loader)
    if is_forgotten:
        warn_about_shared_samples(train, loader)
    return loader


def is_data(source: Any) -> bool:
    """Whether something holds samples, which have to be loaded, and not batches."""
    is_indexed = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    return isinstance(source, Dataset) or (is_indexed and not isinstance(source, list | tuple | deque | DataLoader))


def check_can_be_read(name: str, source: Any) -> None:
    """Raise unless something is a loader, a list of batches, or data to load.

    Raises:
        HAMUMisconfigurationError: Otherwise.
    """
    cure = "Several loaders become one by CombinedLoader(loaders, 'max_size_cycle')."
    is_collection = isinstance(source, list | tuple) and any(isinstance(part, DataLoader) for part in source)
    is_wrong = is_collection or isinstance(source, Mapping)
    if isinstance(source, type) or not (isinstance(source, Iterable) or is_data(source)):
        is_wrong, cure = True, "Give the loader itself, or the data."
    elif isinstance(source, str | bytes | bytearray | memoryview):
        is_wrong, cure = True, "Load what it names, and give the data."
    elif isinstance(source, Tensor | np.ndarray):
        is_wrong = True
        cure = "Tensors become a Dataset by TensorDataset(x, y), positions one by split_forget(dataset, positions)."
    elif isinstance(source, Iterator):
        is_wrong = True
        cure = "What is used up by reading it once cannot be read for several passes: give what makes it, or a list."
    if is_wrong:
        raise HAMUMisconfigurationError(
            f"Expected the data of {name!r} to be a DataLoader, a Dataset or None, but got {type(source).__name__}. "
            f"{cure}"
        )


def check_not_empty(source: Any) -> None:
    """Raise if the source is known to be empty."""
    try:
        size = len(source)
    except (TypeError, NotImplementedError):
        return  # a stream without a length; an empty one is noticed at its first batch
    if size == 0:
        raise HAMUMisconfigurationError(
            f"Expected the data to forget to hold at least one batch, but the {type(source).__name__} is empty. "
            "Check the indices, the sampler, and drop_last with a batch size larger than the forget set."
        )


def warn_about_shared_samples(train: Any, forget: Any) -> None:
    """Warn where samples are both retained and forgotten, as far as it can be seen."""
    shared = count_shared_samples(train, forget)
    if shared:
        rank_zero_warn(
            f"The retain and the forget loader share {count(shared, 'sample')} of one Dataset: the two objectives "
            "pull at the same samples. `retain, forget = split_forget(dataset, indices)` makes disjoint ones."
        )


def _call_hook(trainer: Trainer, name: str) -> Any:
    """The data of `forget_dataloader()`, or of a request of `forget_dataloaders()`."""
    for owner in (trainer.datamodule, trainer.lightning_module):  # type: ignore[attr-defined]
        single, named = (getattr(owner, hook, None) for hook in ("forget_dataloader", "forget_dataloaders"))
        loaders = named() if callable(named) and (name != "forget" or not callable(single)) else {}
        if name in loaders:
            return loaders[name]
        if callable(single) and name == "forget":
            return single()
    return None


def _choose_batch_size(trainer: Trainer, dataset: Any, train: Any) -> int | None:
    """The size of few equal batches; None for a stream, and where samples are ready batches."""
    is_ready = getattr(train, "batch_size", 1) is None and getattr(train, "batch_sampler", None) is None
    size = length_of(dataset)
    if size is None or isinstance(dataset, IterableDataset) or is_ready:
        return None
    return even_batch_size(size, _LARGE, _compat_loaders.count_data_parallel(trainer))


def _build_loader(dataset: Any, train: Any, batch_size: int | None) -> DataLoader[Any]:
    """A shuffling loader over the dataset, otherwise like the training loader."""
    like = train if isinstance(train, DataLoader) else None
    is_stream = isinstance(dataset, IterableDataset)
    if batch_size is None and like is not None and like.batch_size is None and like.batch_sampler is None:
        return load_like(dataset, like, batch_size=None, shuffle=not is_stream)  # its samples are ready batches
    batch_size = batch_size or batch_size_of(like)
    if batch_size is None:
        raise HAMUMisconfigurationError(
            "Expected a batch size for the Dataset to forget, but the training loader has none to follow. "
            "Pass HAMUCallback(passes=PassOptions(batch_size=...)), or a DataLoader as `forget`; where the Dataset "
            "yields ready batches, DataLoader(dataset, batch_size=None)."
        )
    return load_like(dataset, like, batch_size=batch_size, shuffle=not is_stream)


def name_sources(rule: Rule, forget: Any, protect: Mapping[str, Any]) -> dict[str, Any]:
    """The data of each group by name, in the order of the rule.

    Raises:
        HAMUMisconfigurationError: If the rule and the data have different groups.
    """
    names = rule.groups[1:]
    if not isinstance(forget, Mapping) and names == ("forget",) and not protect:
        return {"forget": forget}
    if not isinstance(forget, Mapping) and forget is not None:
        raise HAMUMisconfigurationError(
            f"Expected `forget` to name its groups, for a rule with the groups {names}, but got "
            f"{type(forget).__name__}. Pass HAMUCallback(forget={{name: loader, ...}}, protect={{name: loader, ...}})."
        )
    given = {**protect, **(forget or {})}
    if forget is None and not protect:
        return dict.fromkeys(names)  # the training loader brings them
    unknown, missing = [n for n in given if n not in names], [n for n in names if n not in given]
    if unknown or missing:
        cure = "Give each group to forget a quota and each protected one a floor: FeasibleDirection(quota, floor)."
        if names == ("forget",):
            cure = (
                "Several loaders become one by CombinedLoader(loaders, 'max_size_cycle'); several groups need a rule "
                "for them: FeasibleDirection(quota={name: ...}, floor={name: ...})."
            )
        raise HAMUMisconfigurationError(
            f"Expected data for the rule's groups {names}, but there is none for {missing}, and the rule knows nothing "
            f"of {unknown}. {cure}"
        )
    return {name: given[name] for name in names}


def check_disjoint(forgotten: Mapping[str, Any], protected: Mapping[str, Any]) -> None:
    """Raise where samples are both to be forgotten and protected, as far as it can be seen."""
    for name, loader in forgotten.items():
        for other, kept in protected.items():
            shared = count_shared_samples(loader, kept)
            if shared:
                raise HAMUMisconfigurationError(
                    f"Expected {name!r} and {other!r} to have no sample in common, but they share {shared} of one "
                    "Dataset: what is to be forgotten cannot be protected. Take them out of one of the two."
                )
