"""What is known about other people's loaders, and the way of their batches through the hooks of Lightning."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

__all__ = ["length_of", "loader_options", "own_generators", "stop_workers", "transfer_by_hooks"]


def loader_options(like: Any) -> dict[str, Any]:
    """Return what a DataLoader over other data has in common with this one, besides the batch size.

    Args:
        like: A DataLoader; of other loaders nothing is known.

    Returns:
        Arguments of `DataLoader`.

    Example:
        >>> loader_options(DataLoader([1, 2], num_workers=0, pin_memory=True))["pin_memory"], loader_options([1, 2])
        (True, {})
    """
    names = ("num_workers", "collate_fn", "pin_memory")
    return {name: getattr(like, name) for name in names} if isinstance(like, DataLoader) else {}


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
