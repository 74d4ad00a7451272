"""BatchNorm layers in evaluation mode while the others train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hamu_lightning.errors import HAMUStateError


class FrozenBatchNorm:
    """Keeps BatchNorm layers in evaluation mode, however often something puts them into another, until `thaw()`."""

    def __init__(self) -> None:
        self._modes: dict[_BatchNorm, bool] = {}
        self._layers: list[_BatchNorm] | None = None

    def freeze(self, module: nn.Module) -> None:
        """Put all BatchNorm layers of a module into evaluation mode; they are looked for once."""
        if self._layers is None:
            self._layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        for layer in self._layers:
            if layer.training or layer not in self._modes:
                self._modes.setdefault(layer, layer.training)
                layer.training = False

    def look_again(self) -> None:
        """Look for the layers again at the next call: there may be others."""
        self._layers = None

    def thaw(self) -> None:
        """Put them back into the modes in which they were found."""
        for layer, mode in self._modes.items():
            layer.training = mode
        self._modes.clear()


@contextmanager
def batchnorm_frozen(module: nn.Module, is_frozen: bool) -> Iterator[None]:
    """Keep BatchNorm layers in evaluation mode meanwhile, or not."""
    layers = FrozenBatchNorm()
    try:
        if is_frozen:
            layers.freeze(module)
        yield
    finally:
        layers.thaw()


@contextmanager
def explaining_single_samples() -> Iterator[None]:
    """Say what to do where BatchNorm has a batch of one sample, of which there is no variance.

    Raises:
        HAMUStateError: Then.
    """
    try:
        yield
    except ValueError as error:
        # torch/nn/functional.py `_verify_batch_size`
        if "more than 1 value per channel" not in str(error):
            raise
        raise HAMUStateError(
            "Expected forget batches of two samples or more, since a BatchNorm layer takes its statistics from the "
            "batch, but one has a single sample. Set PassOptions(batchnorm='freeze') where the layer has running "
            "statistics, choose a `batch_size` that leaves no remainder of one, or give a shuffling DataLoader with "
            "drop_last=True."
        ) from error
