"""What became of each forgotten sample."""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hamu_lightning.metrics.functional import ranks_among


@dataclass(frozen=True)
class ForgottenSamples:
    """What became of each forgotten sample in a fit: all measured in evaluation mode, before and after.

    Attributes:
        position: `[N]`, integers: where the sample stands in its Dataset; of a list of batches, its number in a pass.
        loss_before: `[N]`, in the unit of the loss.
        loss_after: `[N]`.
        rank: `[N]`, the share of held-out samples with a lower loss after the fit, in [0, 1]; NaN without such data.
        is_surer: `[N]`, bool: the loss is lower than before.
        is_recognised: `[N]`, 1 where the model still gives the sample's label, else 0; of a sequence the share of its
            places. NaN where the module's output does not say.

    Example:
        >>> table = ForgottenSamples.of(torch.tensor([4, 7]), torch.tensor([0.1, 0.2]), torch.tensor([2.0, 0.1]))
        >>> table.is_surer.tolist(), table.rows()[1]["position"], len(table)
        ([False, True], 7, 2)
    """

    position: Tensor
    loss_before: Tensor
    loss_after: Tensor
    rank: Tensor
    is_surer: Tensor
    is_recognised: Tensor

    @classmethod
    def of(
        cls,
        position: Tensor,
        before: Tensor,
        after: Tensor,
        recognised: Tensor | None = None,
        held_out: Tensor | None = None,
    ) -> ForgottenSamples:
        """Make the table from losses `[N]` before and after, and those of held-out samples `[M]` after."""
        unknown = torch.full_like(after, torch.nan)
        rank = unknown if held_out is None else ranks_among(after, held_out)
        return cls(position, before, after, rank, after < before, unknown if recognised is None else recognised)

    def __len__(self) -> int:
        return len(self.position)

    @property
    def surer(self) -> float:
        """The share of samples that the model is surer of than before."""
        return float(self.is_surer.double().mean())

    @property
    def recognised(self) -> float:
        """The share that it still recognises; NaN where that is not known."""
        return float(self.is_recognised.double().mean())

    def columns(self) -> dict[str, Tensor]:
        """Return the columns by name, `[N]` each."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict for each sample."""
        columns = {name: column.tolist() for name, column in self.columns().items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def to_csv(self, path: str | Path) -> None:
        """Write a line for each sample.

        Args:
            path: The file; one that is there is replaced.
        """
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=[*self.columns()])
            writer.writeheader()
            writer.writerows(self.rows())
