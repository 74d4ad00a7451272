"""What became of each sample of every part."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hamu_lightning.errors import HAMUError, HAMUStateError
from hamu_lightning.evidence._scores import FORGET, Evaluation, PartScores
from hamu_lightning.metrics.functional import ranks_among


class MissingPyArrowError(HAMUError, ImportError):
    """A Parquet file was asked for, but pyarrow is not installed."""


@dataclass(frozen=True)
class SampleTable:
    """What became of each sample, in evaluation mode before and after unlearning; `N` samples of all parts.

    Attributes:
        id: `[N]`, integers: where the sample stands in the Dataset of its part.
        part: The part of each sample: "retain", "forget", "holdout" or "test".
        label: `[N]`, integers, its class; None of what is no classifier with one class per sample.
        loss_before: `[N]`, in the unit of the loss.
        loss_after: `[N]`.
        rank: `[N]`, of forgotten samples the share of comparable held-out ones with a lower loss after unlearning, in
            [0, 1]; NaN of the others, and without such data.
        recognised: `[N]`, 1 where the model gives the label after unlearning, else 0; of a sequence the share of its
            places; NaN where unknown.
        is_surer: `[N]`, bool: the loss is lower than before.

    Example:
        >>> scores = PartScores(torch.tensor([0.1, 0.4]), torch.ones(2), torch.tensor([4, 7]))
        >>> later = PartScores(torch.tensor([2.0, 0.3]), torch.zeros(2), torch.tensor([4, 7]))
        >>> table = SampleTable.of(Evaluation({"forget": scores}), Evaluation({"forget": later}))
        >>> table.is_surer.tolist(), table.rows()[1]["id"], len(table)
        ([False, True], 7, 2)
    """

    id: Tensor
    part: tuple[str, ...]
    label: Tensor | None
    loss_before: Tensor
    loss_after: Tensor
    rank: Tensor
    recognised: Tensor
    is_surer: Tensor

    @classmethod
    def of(cls, before: Evaluation, after: Evaluation) -> SampleTable:
        """Make the table from two evaluations of the same samples.

        Raises:
            HAMUStateError: If they are not of the same samples.
        """
        first = before.at(after)
        if first is None:
            raise HAMUStateError(
                "Expected the same samples before and after, but some of those after were not measured before. Give "
                "both evaluations the same parts."
            )
        parts = [*after.parts.values()]
        held_out = after.comparable()
        labels = [scores.labels for scores in parts if scores.labels is not None]
        loss_before = torch.cat([scores.losses for scores in first.parts.values()])
        loss_after = torch.cat([scores.losses for scores in parts])
        return cls(
            id=torch.cat([scores.ids for scores in parts]),
            part=tuple(name for name, scores in after.parts.items() for _ in range(len(scores))),
            label=torch.cat(labels) if len(labels) == len(parts) else None,
            loss_before=loss_before,
            loss_after=loss_after,
            rank=torch.cat([_rank(name, scores, held_out) for name, scores in after.parts.items()]),
            recognised=torch.cat([scores.recognised for scores in parts]),
            is_surer=loss_after < loss_before,
        )

    def __len__(self) -> int:
        return len(self.id)

    def columns(self) -> dict[str, list[Any]]:
        """Return the columns by name, a value for each sample; without `label` where there is none."""
        found = {name: column for name, column in vars(self).items() if column is not None}
        return {name: column.tolist() if isinstance(column, Tensor) else [*column] for name, column in found.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict for each sample."""
        columns = self.columns()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def to_csv(self, path: str | Path) -> None:
        """Write a line for each sample.

        Args:
            path: The file; one that is there is replaced.
        """
        columns = self.columns()
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))

    def to_parquet(self, path: str | Path) -> None:
        """Write the columns to a Parquet file.

        Args:
            path: The file; one that is there is replaced.

        Raises:
            MissingPyArrowError: If pyarrow is not installed.
        """
        try:
            arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
        except ImportError as error:
            raise MissingPyArrowError(
                "Expected pyarrow for Parquet files, but it is not installed. Run: pip install pyarrow, or use to_csv."
            ) from error
        parquet.write_table(arrow.table(self.columns()), str(path))


def _rank(name: str, scores: PartScores, held_out: PartScores | None) -> Tensor:
    if name != FORGET or held_out is None:
        return torch.full_like(scores.losses, torch.nan)
    return ranks_among(scores.losses, held_out.losses)
