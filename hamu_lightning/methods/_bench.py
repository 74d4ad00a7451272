"""One seed of a comparison: the two models that everything starts from and ends at, and runs between them."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from hamu_lightning.errors import HAMUStateError
from hamu_lightning.methods._data import joined, with_train_loader
from hamu_lightning.methods._evaluation import Parts, Seen, evaluate_parts, measure
from hamu_lightning.methods._fingerprint import fingerprint
from hamu_lightning.methods._metering import Meter, PathRecorder
from hamu_lightning.methods._protocol import DataSource, Forget, Method
from hamu_lightning.methods._retrain import Retrain
from hamu_lightning.methods._storage import load_json, save_json
from hamu_lightning.methods._training_run import TrainingRun
from hamu_lightning.methods._tuning import TuneBy, score
from hamu_lightning.randomness import RandomStream


@dataclass(frozen=True)
class Run:
    """What one method came to, with one seed and one value of its hyper-parameter.

    Args:
        name: The method.
        seed: The seed.
        trial: The number of the value.
        value: The value; None where nothing is tuned.
        score: How bad the trial is by the criterion of the tuning; lower is better.
        numbers: UA, RA, TA, MIA (fractions), KL, retain_loss, forget_loss (nats), and further metrics.
        seconds: Wall-clock time, without the measurements; NaN where it is not known.
        memory: Peak memory, MiB.
        path: Step, retain loss and forget loss on the way; step 0 is the original.
    """

    name: str
    seed: int
    trial: int
    value: float | None
    score: float
    numbers: dict[str, float]
    seconds: float
    memory: float
    path: list[tuple[int, float, float]]


@dataclass(frozen=True)
class Problem:
    """What is the same for all seeds and methods; `key` is a hash of it."""

    module_factory: Callable[[], LightningModule]
    datamodule: DataSource
    forget: Forget
    parts: Parts
    options: Mapping[str, Any]
    metrics: Mapping[str, Callable[[LightningModule, Parts], float]]
    tune_by: TuneBy
    path_every: int
    device: torch.device
    out: Path
    key: str


class Bench:
    """The original and the retrained model of one seed, and the runs that start from the original.

    Args:
        problem: The problem.
        seed: The seed of both trainings and of all methods.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem, self._seed = problem, seed
        both = joined(problem.datamodule.train_dataloader(), problem.forget)
        self._original, original_cost = self._train("original", with_train_loader(problem.datamodule, both))
        self._retrained, retrained_cost = self._train("retrained", problem.datamodule)
        self._original_seen = evaluate_parts(self._original, problem.parts)
        self._retrained_seen = evaluate_parts(self._retrained, problem.parts)
        self.references = [
            self._finish("original", 0, None, self._original, self._original_seen, *original_cost, []),
            self._finish("retrained", 0, None, self._retrained, self._retrained_seen, *retrained_cost, []),
        ]

    def run(self, name: str, trial: int, value: float | None, method: Method) -> Run:
        """Return the run of a method: read if it is there, else made and written."""
        method = with_seed(method, self._seed)
        key = fingerprint(self._problem.key, self._seed, method)
        file = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)[:80]}-seed{self._seed}-trial{trial}-{key}.json"
        path = self._problem.out / "runs" / file
        found = load_json(path)
        if found is None:
            found = asdict(self._make(name, trial, value, method))
            save_json(path, found)
        try:
            return Run(**{**found, "name": name, "trial": trial, "path": [tuple(point) for point in found["path"]]})
        except (TypeError, KeyError) as error:
            raise HAMUStateError(
                f"Expected {str(path)!r} to be a run that `compare` wrote, but it has other entries. Delete it; it is "
                "then run again."
            ) from error

    def _make(self, name: str, trial: int, value: float | None, method: Method) -> Run:
        problem = self._problem
        recorder = PathRecorder(problem.parts.retain, problem.parts.forget, problem.path_every)
        if isinstance(method, TrainingRun):
            method = method.observed_by(recorder)
        # One that breaks its promise not to change the module must not spoil the others.
        module = copy.deepcopy(self._original)
        # Methods without a seed of their own draw from the global generators.
        with RandomStream(self._seed).active(), Meter() as meter:
            module = method(module, problem.datamodule, problem.forget)
        module = module.to(problem.device)  # a fit ends with its module in host memory
        seen = evaluate_parts(module, problem.parts)
        seconds = meter.seconds - recorder.seconds
        return self._finish(name, trial, value, module, seen, seconds, meter.peak, recorder.path)

    def _train(self, name: str, datamodule: DataSource) -> tuple[LightningModule, tuple[float, float]]:
        problem = self._problem
        retrain = Retrain(problem.module_factory, problem.options, self._seed, problem.out / "models")
        path = problem.out / "costs" / f"{name}-seed{self._seed}-{problem.key}.json"
        found = retrain.load(datamodule)
        if found is not None:
            seconds, peak = load_json(path) or (math.nan, math.nan)
            return found.to(problem.device), (seconds, peak)
        with Meter() as meter:
            module = retrain(None, datamodule)
        save_json(path, (meter.seconds, meter.peak))
        return module.to(problem.device), (meter.seconds, meter.peak)

    def _finish(
        self,
        name: str,
        trial: int,
        value: float | None,
        module: LightningModule,
        seen: Seen,
        seconds: float,
        memory: float,
        path: list[tuple[int, float, float]],
    ) -> Run:
        numbers = measure(seen, self._retrained_seen)
        numbers |= {
            title: float(metric(module, self._problem.parts)) for title, metric in self._problem.metrics.items()
        }
        start = (0, self._original_seen.retain.loss, self._original_seen.forget.loss)
        path = path or [start, (1, numbers["retain_loss"], numbers["forget_loss"])]
        badness = score(seen, self._retrained_seen, self._original_seen, self._problem.tune_by)
        return Run(name, self._seed, trial, value, badness, numbers, seconds, memory, path)


def with_seed(method: Method, seed: int) -> Method:
    """Return the method with this seed, if it is a dataclass with a field `seed`."""
    has_seed = is_dataclass(method) and not isinstance(method, type) and "seed" in method.__dataclass_fields__
    return replace(method, seed=seed) if has_seed else method  # type: ignore[type-var]
