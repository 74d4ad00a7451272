"""What Lightning keeps private of loaders, and of the processes that read different data. See `_compat`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def train_loader_parts(trainer: Trainer) -> Any:
    """The training loader or loaders as the user gave them, after the trainer has prepared them."""
    loader = trainer.train_dataloader
    return getattr(loader, "iterables", loader)


class CombinedBatches:
    """The batches of a `CombinedLoader`, which itself yields `(batch, batch_idx, dataloader_idx)`.

    Args:
        combined: The loader.

    Attributes:
        loaders: The loaders that are combined.
    """

    def __init__(self, combined: Any) -> None:
        self._combined, self.loaders = combined, combined.flattened

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, *_ in self._combined)

    def prepare(self, trainer: Trainer) -> CombinedBatches:
        """Prepare each of the loaders."""
        self._combined.flattened = [prepare_loader(trainer, loader) for loader in self.loaders]
        return CombinedBatches(self._combined)

    def twin(self, twin: Callable[[Any], Any]) -> CombinedBatches:
        """The same batches from loaders that `twin` makes of these ones."""
        combined = type(self._combined)(self._combined.iterables, self._combined._mode)
        combined.flattened = [twin(loader) for loader in self.loaders]
        return CombinedBatches(combined)


def without_indices(loader: Any) -> Any:
    """The loader, or its batches alone where it is a `CombinedLoader` (of either package)."""
    is_combined = any(base.__name__ == "CombinedLoader" for base in type(loader).__mro__)
    return CombinedBatches(loader) if is_combined else loader


def train_batches(trainer: Trainer) -> CombinedBatches:
    """The training batches, as the trainer combines them."""
    return CombinedBatches(trainer.fit_loop._combined_loader)


def prepare_loader(trainer: Trainer, loader: Any) -> Any:
    """Let the trainer and the strategy treat the forget loader like a training loader (distributed sampler)."""
    if isinstance(loader, CombinedBatches):
        return loader.prepare(trainer)
    is_shuffled = isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler)
    before = getattr(loader, "sampler", None)
    modes = type(trainer.state.stage) if trainer.state.stage is not None else None
    mode = None if modes is None else modes("train")
    loader = trainer._data_connector._prepare_dataloader(loader, shuffle=is_shuffled, mode=mode)  # type: ignore[arg-type]
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler) and sampler is not before:
        # Lightning's sampler repeats samples until all processes have the same number. Repeated ones would count twice.
        sampler.total_size = len(sampler.dataset)  # type: ignore[arg-type]
        sampler.num_samples = len(range(sampler.rank, sampler.total_size, sampler.num_replicas))
    return trainer.strategy.process_dataloader(loader)


def data_rank(trainer: Trainer) -> int:
    """Which of the processes that load different data this is."""
    return int((trainer.distributed_sampler_kwargs or {}).get("rank", 0))


def count_data_parallel(trainer: Trainer) -> int:
    """How many processes load different data."""
    return int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1))


def data_parallel_group(trainer: Trainer) -> Any | None:
    """The processes that load different data; None where there is one."""
    if count_data_parallel(trainer) == 1:
        return None
    mesh = getattr(trainer.strategy, "device_mesh", None)
    return torch.distributed.group.WORLD if mesh is None else mesh["data_parallel"].get_group()


def held_out_loader(trainer: Trainer) -> Any:
    """What the datamodule's own `holdout_dataloader()` gives; None where there is no such hook."""
    hook = getattr(trainer.datamodule, "holdout_dataloader", None)  # type: ignore[attr-defined]
    return hook() if callable(hook) else None
