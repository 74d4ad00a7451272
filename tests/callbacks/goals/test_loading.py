"""Data given as Datasets are loaded as the training data, wherever they are read: by their collator, in their size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset

from hamu_lightning import HAMUCallback, Holdout, Unseen
from hamu_lightning.callbacks import PassOptions
from tests.callbacks.modules import Base, build, fit, make_data


class Ragged(Dataset[Any]):
    """Samples of several lengths, as texts are: nothing but the right collator makes batches of them."""

    def __init__(self, n: int, seed: int) -> None:
        self.data = make_data(n, seed)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[i]
        return x[: 6 + i % 5], y


class Pad:
    def __init__(self) -> None:
        self.sizes: set[int] = set()

    def __call__(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        self.sizes.add(len(samples))
        rows = [torch.nn.functional.pad(x, (0, 10 - len(x))) for x, _ in samples]
        return torch.stack(rows), torch.stack([y for _, y in samples])


@pytest.mark.parametrize("sampled", [False, True], ids=["size", "sampler"])
@pytest.mark.parametrize("kind", [Holdout, Unseen])
@pytest.mark.filterwarnings("ignore:The fit has ended before the target")
def test_a_collator_is_used_wherever_data_are_read(kind: Any, sampled: bool) -> None:
    """By targets, the preflight, the guard, and the readings of single samples; in batches of no other size."""
    train, pad = Ragged(48, 0), Pad()
    loader: Any = DataLoader(train, batch_size=8, shuffle=True, collate_fn=pad)
    if sampled:
        loader = DataLoader(train, batch_sampler=BatchSampler(RandomSampler(train), 8, drop_last=False), collate_fn=pad)
    hamu = HAMUCallback(
        Subset(Ragged(24, 9), range(16)),
        target=kind(Ragged(24, 4)),
        preflight=True,
        passes=PassOptions(batch_size=8),
    )
    fit(build(Base), hamu, loader=loader, max_steps=3)
    assert hamu.preflight_report is not None and hamu.combined_steps == 3
    assert "In evaluation mode:\n    retain loss" in hamu.summary
    assert pad.sizes <= {1, 8}  # single samples where losses of samples are told by batches of one
