"""Random streams of their own: what draws from one leaves the random numbers of training as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["RandomStream", "capture_random", "restore_random"]


class RandomStream:
    """Runs code on random numbers of its own: torch (CPU and CUDA), numpy, `random`, and given generators.

    Inside `with stream.active():` the global generators are seeded from the stream's seed, the rank and the number of
    the present draw; outside they are what they were. So the whole state of the stream is one number, `draw`.

    Args:
        seed: Where the stream begins.
        rank: Which of the processes that load different data this is.
        *more: Numbers that tell the stream from others with the same seed.

    Attributes:
        generators: Generators of your own that the stream seeds and puts back together with the global ones.
        draw: The number of the present draw; count it up for new numbers.

    Example:
        >>> stream = RandomStream(seed=1)
        >>> before = torch.get_rng_state()
        >>> with stream.active():
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """

    def __init__(self, seed: int, rank: int = 0, *more: int) -> None:
        self._key = (seed % 2**63, rank, *more)
        self.generators: Sequence[torch.Generator] = ()
        self.draw = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Swap the stream's random numbers in, and out again at the end."""
        outside = capture_random(self.generators)
        self.reseed()
        try:
            yield
        finally:
            restore_random(outside, self.generators)

    def reseed(self) -> None:
        """Begin the random numbers of the present draw; only while the stream is active."""
        sequence = np.random.SeedSequence((*self._key, self.draw))
        # As Python's numbers: those of numpy mean other things in its versions 1 and 2.
        seed, other = (int(word) for word in sequence.generate_state(2, np.uint64))
        seed >>= 1
        # Not `torch.manual_seed`: before CUDA is in use, that leaves a seed for later behind.
        torch.default_generator.manual_seed(seed)
        if _uses_cuda():
            torch.cuda.manual_seed_all(seed)
        random.seed(other)
        np.random.seed(other % 2**32)
        for offset, generator in enumerate(self.generators, start=1):
            generator.manual_seed(seed ^ offset)


def capture_random(generators: Sequence[torch.Generator] = ()) -> tuple[Any, ...]:
    """Return the states of all random generators that a training step may draw from.

    Args:
        generators: Generators beside the global ones of torch (CPU and, where it is in use, CUDA), numpy and `random`.

    Returns:
        What `restore_random` takes, with the same generators.
    """
    cuda = torch.cuda.get_rng_state_all() if _uses_cuda() else None
    own = [generator.get_state() for generator in generators]
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate(), own


def restore_random(state: tuple[Any, ...], generators: Sequence[torch.Generator] = ()) -> None:
    """Put the states back that `capture_random` returned.

    Args:
        state: What `capture_random` returned.
        generators: The generators that it was given, in the same order.
    """
    cpu, cuda, arrays, python, own = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    np.random.set_state(arrays)
    random.setstate(python)
    for generator, saved in zip(generators, own, strict=True):
        generator.set_state(saved)


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
