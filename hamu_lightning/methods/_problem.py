"""A problem, a run on it, and the models that runs are measured by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from hamu_lightning.methods._evaluation import Parts, Seen
from hamu_lightning.methods._metering import Meter
from hamu_lightning.methods._protocol import DataSource, Forget
from hamu_lightning.methods._retrain import Retrain
from hamu_lightning.methods._storage import load_json, save_json
from hamu_lightning.methods._tuning import TuneBy
from hamu_lightning.metrics.functional import log_odds


@dataclass(frozen=True)
class Run:
    """What one method came to, with one seed and one value of its hyper-parameter.

    Args:
        name: The method.
        seed: The seed.
        trial: The number of the value.
        value: The value; None where nothing is tuned.
        score: How bad the trial is by the criterion of the tuning; lower is better.
        numbers: UA, RA, TA, MIA (fractions), KL, retain_loss, forget_loss (nats); the distances from the pool JS,
            JS_test, KS, agreement, surer (fractions) and log_odds (nats); and further metrics.
        seconds: Wall-clock time, without the measurements; NaN where it is not known.
        memory: Peak memory, MiB.
        path: Step, retain loss and forget loss on the way; step 0 is the original.
        log_odds: Of the label of each forget sample, nats, at the end.
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
    log_odds: list[float] = field(default_factory=list)


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


def train(
    problem: Problem, name: str, seed: int, datamodule: DataSource
) -> tuple[LightningModule, tuple[float, float]]:
    """Train a reference, or read it; return it with the seconds and the MiB that it took, NaN where not known."""
    retrain = Retrain(problem.module_factory, problem.options, seed, problem.out / "models")
    path = problem.out / "costs" / f"{name}-seed{seed}-{problem.key}.json"
    found = retrain.load(datamodule)
    if found is not None:
        seconds, peak = load_json(path) or (math.nan, math.nan)
        return found.to(problem.device), (seconds, peak)
    with Meter() as meter:
        module = retrain(None, datamodule)
    save_json(path, (meter.seconds, meter.peak))
    return module.to(problem.device), (meter.seconds, meter.peak)


def list_log_odds(seen: Seen) -> list[float]:
    """Return the log-odds of the label of each forget sample."""
    found: list[float] = log_odds(seen.forget.log_probs, seen.forget.labels).tolist()
    return found


def ask_metrics(problem: Problem, module: LightningModule) -> dict[str, float]:
    """Return the user's own numbers of a model."""
    return {title: float(metric(module, problem.parts)) for title, metric in problem.metrics.items()}
