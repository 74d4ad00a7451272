"""BatchNorm layers in evaluation mode while the others train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class FrozenBatchNorm:
    """Keeps BatchNorm layers in evaluation mode, however often something puts them into another, until `thaw()`."""

    def __init__(self) -> None:
        self._modes: dict[_BatchNorm, bool] = {}

    def freeze(self, module: nn.Module) -> None:
        """Put all BatchNorm layers of a module into evaluation mode."""
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                self._modes.setdefault(layer, layer.training)
                layer.training = False

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
