"""What the tests of the callback share."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUOptimizer
from hamu_lightning.rules import RelativeRadius
from tests.callbacks.modules import Base, make_data

RULE = HAMUQ(0.02, radius=RelativeRadius(0.05))


def forget_data() -> TensorDataset:
    return make_data(40, seed=9)


class Manual(Base):
    """The recipe that the refusal of manual optimization gives."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.forget = next(iter(DataLoader(forget_data(), batch_size=40)))

    def before_step(self, optimizer: Any) -> None:
        pass

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        with optimizer.retain():
            self.manual_backward(super().training_step(batch, batch_idx))
        with optimizer.forget():
            self.manual_backward(super().training_step(self.forget, batch_idx))
        self.before_step(optimizer)
        optimizer.step()
        assert optimizer.last_step is not None

    @override
    def configure_optimizers(self) -> Any:
        return HAMUOptimizer(torch.optim.SGD(self.parameters(), lr=0.05), RULE)
