"""The dtype of sums."""

from __future__ import annotations

import torch

from hamu_lightning.gramian import widest_float


def state_float() -> torch.dtype:
    """The widest float that a state may have on every device that this machine has.

    One dtype from the start, the same on all processes: a reduction may mix ranks with and without an update.
    """
    return widest_float(torch.device("mps" if torch.backends.mps.is_available() else "cpu"))
