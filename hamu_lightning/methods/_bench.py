"""One seed of a comparison: the two models that everything starts from and ends at, and runs between them."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass, replace

from lightning.pytorch import LightningModule

from hamu_lightning.errors import HAMUStateError
from hamu_lightning.methods._data import joined, with_train_loader
from hamu_lightning.methods._evaluation import Seen, evaluate_parts, measure
from hamu_lightning.methods._fingerprint import fingerprint
from hamu_lightning.methods._metering import Meter, PathRecorder
from hamu_lightning.methods._pool import measure_distances
from hamu_lightning.methods._problem import Problem, Run, ask_metrics, list_log_odds, train
from hamu_lightning.methods._protocol import Method
from hamu_lightning.methods._storage import load_json, save_json
from hamu_lightning.methods._training_run import TrainingRun
from hamu_lightning.methods._tuning import score
from hamu_lightning.randomness import RandomStream


class Bench:
    """The original and the retrained model of one seed, and the runs that start from the original.

    Args:
        problem: The problem.
        seed: The seed of both trainings and of all methods.
        pool: What models that were retrained with other seeds say; empty for the retrained model of this seed alone.
    """

    def __init__(self, problem: Problem, seed: int, pool: Sequence[Seen] = ()) -> None:
        self._problem, self._seed = problem, seed
        both = joined(problem.datamodule.train_dataloader(), problem.forget)
        self._original, original_cost = train(problem, "original", seed, with_train_loader(problem.datamodule, both))
        retrained, retrained_cost = train(problem, "retrained", seed, problem.datamodule)
        self.original_seen = evaluate_parts(self._original, problem.parts)
        self._retrained_seen = evaluate_parts(retrained, problem.parts)
        self._pool = pool or [self._retrained_seen]
        self.references = [
            self._finish("original", 0, None, self._original, self.original_seen, *original_cost, []),
            self._finish("retrained", 0, None, retrained, self._retrained_seen, *retrained_cost, []),
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
        numbers |= measure_distances(seen, self._pool, self.original_seen)
        numbers |= ask_metrics(self._problem, module)
        start = (0, self.original_seen.retain.loss, self.original_seen.forget.loss)
        path = path or [start, (1, numbers["retain_loss"], numbers["forget_loss"])]
        badness = score(seen, self._retrained_seen, self.original_seen, self._problem.tune_by)
        odds = list_log_odds(seen)
        return Run(name, self._seed, trial, value, badness, numbers, seconds, memory, path, odds)


def with_seed(method: Method, seed: int) -> Method:
    """Return the method with this seed, if it is a dataclass with a field `seed`."""
    has_seed = is_dataclass(method) and not isinstance(method, type) and "seed" in method.__dataclass_fields__
    return replace(method, seed=seed) if has_seed else method  # type: ignore[type-var]
