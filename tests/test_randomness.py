"""Random numbers of one's own: the same on every version of numpy, and no trace outside."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hamu_lightning.randomness import RandomStream

PINNED = {
    (0,): (0.26871877908706665, 0.41436762517133374, 0.2481188697184994, 0.06207859516143799),
    (7, 1, 33): (0.25747621059417725, 0.8269420213666148, 0.44234671953087057, 0.5232772827148438),
    (2**64 - 1,): (0.86708003282547, 0.7173238395544419, 0.24917059104083283, 0.48760348558425903),
}


@pytest.mark.parametrize("key", PINNED)
def test_the_numbers_are_those_of_earlier_versions(key: tuple[int, ...]) -> None:
    """A resumed run goes on with them, whatever is installed now."""
    stream, generator = RandomStream(*key), torch.Generator()
    stream.draw, stream.generators = 5, [generator]
    with stream.active():
        drawn = torch.rand(()).item(), random.random(), np.random.rand(), torch.rand((), generator=generator).item()
    assert drawn == PINNED[key]


def test_nothing_is_left_to_be_seeded_later() -> None:
    """`torch.manual_seed` leaves a seed for CUDA, which takes effect when CUDA is first used: after the stream."""
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use already")  # and its generators are put back like the others
    before = torch.cuda._lazy_seed_tracker.get_calls()
    with RandomStream(1).active():
        torch.rand(1)
    assert torch.cuda._lazy_seed_tracker.get_calls() == before
