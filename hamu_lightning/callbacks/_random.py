"""A random stream of its own for the forget pass."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RandomStream:
    """Runs code on random states of its own: torch (CPU and CUDA), numpy, `random`, and given generators.

    Inside `with stream.active():` the global generators continue the stream; outside they are what they were. The
    state consists of tensors, numbers and lists only, so that it loads under `weights_only`.

    Args:
        seed: Where the stream begins.

    Example:
        >>> stream = RandomStream(seed=1)
        >>> before = torch.get_rng_state()
        >>> with stream.active():
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generators: Sequence[torch.Generator] = ()
        self._state: dict[str, Any] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Swap the stream's state in, and out again at the end."""
        outside = capture_random_state(self.generators)
        self._enter()
        try:
            yield
        finally:
            self._state = capture_random_state(self.generators)
            restore_random_state(outside, self.generators)

    def state_dict(self) -> dict[str, Any]:
        """Return the present state of the stream; empty before it was first used."""
        return dict(self._state or {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self._state = dict(state) or None

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the stream at this moment, while it is active."""
        return capture_random_state(self.generators)

    def _enter(self) -> None:
        if self._state is not None:
            restore_random_state(self._state, self.generators)
            return
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)
        torch.manual_seed(self.seed)
        for offset, generator in enumerate(self.generators, start=1):
            generator.manual_seed(self.seed + offset)


def capture_random_state(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """Return the states of all random generators that a training step may draw from."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if _uses_cuda() else [],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "python": [version, list(words), gauss],
        "generators": [generator.get_state() for generator in generators],
    }


def restore_random_state(state: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Put all random generators into a captured state."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and _uses_cuda():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, _as_words(keys), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    for generator, saved in zip(generators, state["generators"], strict=False):
        generator.set_state(saved)


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _as_words(keys: Tensor) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return keys.cpu().numpy().astype(np.uint32)
