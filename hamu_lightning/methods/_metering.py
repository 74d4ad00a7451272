"""What a method costs, and the way it takes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from hamu_lightning.methods._evaluation import evaluate

_STATM = Path("/proc/self/statm")
_MIB = 2**20


class Meter:
    """Measures time and peak memory inside `with Meter() as meter:`.

    On CUDA the peak is that of the memory that torch has allocated. Elsewhere it is the resident memory of the whole
    process, looked at every 10 ms, where the system shows it (Linux), and else NaN.

    Attributes:
        seconds: Wall-clock time.
        peak: Peak memory, MiB.
    """

    seconds = math.nan
    peak = math.nan

    def __enter__(self) -> Meter:
        self._on_cuda = torch.cuda.is_available()
        self._highest, self._done = 0, Event()
        self._thread = Thread(target=self._watch, daemon=True)
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
        elif _STATM.exists():
            self._thread.start()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()
            self._highest = torch.cuda.max_memory_allocated()
        self.seconds = time.perf_counter() - self._start
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self.peak = self._highest / _MIB if self._highest else math.nan

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while True:
            self._highest = max(self._highest, int(_STATM.read_text().split()[1]) * page)
            if self._done.wait(0.01):
                return


class PathRecorder(Callback):
    """Measures the mean losses on all retain and all forget samples at the start, every few steps, and at the end.

    Args:
        retain: Batches `(x, y)` of all retain samples.
        forget: Batches of all forget samples.
        every: Steps between two points.

    Attributes:
        path: Step, retain loss, forget loss of each point.
        seconds: The time that measuring took.
    """

    def __init__(self, retain: Iterable[Any], forget: Iterable[Any], every: int) -> None:
        self._retain, self._forget, self._every = retain, forget, every
        self.path: list[tuple[int, float, float]] = []
        self.seconds = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure(trainer.global_step, pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step >= self.path[-1][0] + self._every:
            self._measure(trainer.global_step, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self.path[-1][0]:
            self._measure(trainer.global_step, pl_module)

    def _measure(self, step: int, module: LightningModule) -> None:
        start = time.perf_counter()
        self.path.append((step, evaluate(module, self._retain).loss, evaluate(module, self._forget).loss))
        self.seconds += time.perf_counter() - start
