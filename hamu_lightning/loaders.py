"""What is known about other people's loaders, and the way of their batches through the hooks of Lightning."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

__all__ = [
    "BATCH_SIZE",
    "batch_size_of",
    "in_order",
    "even_batch_size",
    "length_of",
    "load_like",
    "loader_options",
    "own_generators",
    "set_epoch",
    "stop_workers",
    "transfer_by_hooks",
]

# In batches of so many samples where nothing says how many.
BATCH_SIZE = 128
# A DataLoader without workers refuses these.
_OF_WORKERS = ["prefetch_factor", "persistent_workers", "multiprocessing_context"]


def loader_options(like: Any) -> dict[str, Any]:
    """Return what a DataLoader over other data has in common with this one, besides the batch size.

    Args:
        like: A DataLoader; of other loaders nothing is known.

    Returns:
        Arguments of `DataLoader`. Not among them are what belongs to its own data (samplers, a generator), and
        `drop_last`: no sample is to be left out.

    Example:
        >>> loader_options(DataLoader([1, 2], num_workers=0, pin_memory=True))["pin_memory"], loader_options([1, 2])
        (True, {})
    """
    names = ["num_workers", "collate_fn", "pin_memory", "worker_init_fn", "timeout"]
    if getattr(like, "num_workers", 0):
        names += _OF_WORKERS
    if not isinstance(like, DataLoader):
        return {}
    options = {name: getattr(like, name) for name in names}
    if _is_ready(like):  # its `collate_fn` is for single samples
        del options["collate_fn"]
    return options


def load_like(dataset: Any, like: Any, **settings: Any) -> DataLoader[Any]:
    """Make a loader over other data, otherwise like this one; of a subclass, with all that the subclass adds.

    Args:
        dataset: The data.
        like: A DataLoader; of other loaders nothing is known.
        **settings: Arguments of `DataLoader` that come first.

    Example:
        >>> class Doubles(DataLoader):
        ...     def __iter__(self):
        ...         return (2 * batch for batch in super().__iter__())
        >>> list(load_like([5, 6], Doubles([1, 2, 3]), batch_size=2))
        [tensor([10, 12])]
    """
    options = {**loader_options(like), **settings}
    if not options.get("num_workers"):
        options = {name: value for name, value in options.items() if name not in _OF_WORKERS}
    if options.get("batch_size") is None:
        options["collate_fn"] = getattr(like, "collate_fn", None)
    made: DataLoader[Any] = DataLoader(dataset, **options)
    if not isinstance(like, DataLoader) or type(like) is DataLoader:
        return made
    # Constructors of subclasses differ. A copy has what they set; what DataLoader itself sets comes from the new one.
    twin = copy.copy(like)
    # lightning/fabric/utilities/data.py `_wrap_init_method` notes with which data a loader was made, to make it again.
    noted = [name for name in vars(twin) if name.startswith("__pl_saved")]
    for name in noted:
        del twin.__dict__[name]
    twin.__dict__.update(vars(made))
    return twin


def in_order(source: Any, like: Any = None, **settings: Any) -> Any:
    """Return a loader of each sample of a Dataset once, in its order.

    Args:
        source: A Dataset, a DataLoader (its order and its `drop_last` are left out), or another iterable of batches,
            which is taken as it is.
        like: Where `source` is a Dataset: the loader whose batch size and collation are used; else batches of 128.
        **settings: Arguments of `DataLoader` that come first.

    Example:
        >>> [batch.tolist() for batch in in_order(DataLoader([1, 2, 3], batch_size=2, shuffle=True, drop_last=True))]
        [[1, 2], [3]]
    """
    if isinstance(source, DataLoader):
        source, like = source.dataset, source
    elif not isinstance(source, Dataset):
        return source
    return load_like(source, like, **{"batch_size": batch_size_of(like, BATCH_SIZE), **settings})


def batch_size_of(loader: Any, default: int | None = None) -> int | None:
    """Return how many samples a loader, or its batch sampler, puts into a batch; None where its data are batches.

    Args:
        loader: A loader, or None.
        default: What is returned where nobody says it.

    Example:
        >>> from torch.utils.data import BatchSampler, SequentialSampler
        >>> sampler = BatchSampler(SequentialSampler(range(10)), 4, drop_last=False)
        >>> batch_size_of(DataLoader(range(10), batch_sampler=sampler)), batch_size_of(DataLoader([1], None), default=8)
        (4, None)
        >>> batch_size_of([1, 2]), batch_size_of(None, default=8)
        (None, 8)
    """
    if _is_ready(loader):
        return None
    sizes = (getattr(part, "batch_size", None) for part in (loader, getattr(loader, "batch_sampler", None)))
    return next((size for size in sizes if isinstance(size, int)), default)


def _is_ready(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and loader.batch_size is None and loader.batch_sampler is None


def own_generators(loader: Any) -> list[torch.Generator]:
    """Return the generators that a loader and its samplers draw from besides the global one, each once.

    Example:
        >>> generator = torch.Generator()
        >>> own_generators(DataLoader([1, 2], shuffle=True, generator=generator)) == [generator]
        True
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def length_of(loader: Any) -> int | None:
    """Return how many batches a loader says it has; None where it does not.

    Example:
        >>> length_of(DataLoader([1, 2, 3], batch_size=2)), length_of(iter([1]))
        (2, None)
    """
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def even_batch_size(size: int, most: int, processes: int = 1) -> int:
    """Return the size of as few equal batches as there can be.

    Args:
        size: The number of samples.
        most: The largest batch, of all processes together.
        processes: How many load different samples.

    Example:
        >>> even_batch_size(200, 256), even_batch_size(300, 256), even_batch_size(300, 256, processes=2)
        (200, 150, 75)
    """
    return math.ceil(math.ceil(size / math.ceil(size / most)) / processes)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a loader, its samplers and its data which pass over them begins, as far as they want to know.

    Args:
        loader: A loader of any kind.
        epoch: The number of the pass, from 0.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    for holder in {id(h): h for h in (loader, getattr(loader, "dataset", None), *holders)}.values():
        tell = getattr(holder, "set_epoch", None)
        if callable(tell):
            tell(epoch)


def stop_workers(loader: Any) -> None:
    """End the persistent workers of a DataLoader, if it has any; its next pass starts new ones.

    Args:
        loader: A DataLoader; others are left alone.
    """
    iterator = getattr(loader, "_iterator", None) if isinstance(loader, DataLoader) else None
    if iterator is not None:
        # torch offers no other way (lightning/pytorch/utilities/combined_loader.py does the same at the end of a fit)
        getattr(iterator, "_shutdown_workers", lambda: None)()
        loader._iterator = None


def transfer_by_hooks(owner: Any, batch: Any, device: torch.device) -> Any:
    """Send a batch to a device by the hooks of its owner, as a Trainer does for the first loader.

    Args:
        owner: A LightningModule or a LightningDataModule.
        batch: The batch.
        device: Where it is to go.

    Returns:
        What the last hook returns.
    """
    batch = owner.on_before_batch_transfer(batch, 0)
    return owner.on_after_batch_transfer(owner.transfer_batch_to_device(batch, device, 0), 0)
