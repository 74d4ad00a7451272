"""Methods side by side: the same models, the same batches, the same number of trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias, get_args

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_info

from hamu_lightning.checks import check_choice, check_count, check_seed, check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.methods._bench import Bench, Problem, Run
from hamu_lightning.methods._comparison import REFERENCES, Comparison
from hamu_lightning.methods._data import hooked, in_order
from hamu_lightning.methods._evaluation import Parts
from hamu_lightning.methods._fingerprint import fingerprint, hash_batches
from hamu_lightning.methods._protocol import DataSource, Forget, Method
from hamu_lightning.methods._tuning import Search, TuneBy

Metric: TypeAlias = Callable[[LightningModule, Parts], float]


def compare(
    module_factory: Callable[[], LightningModule],
    datamodule: DataSource,
    forget: Forget,
    methods: Mapping[str, Method | Search] | Sequence[Method],
    *,
    out: str | Path,
    options: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    trials: int = 5,
    tune_by: TuneBy = "retrained",
    metrics: Mapping[str, Metric] | None = None,
    path_every: int = 5,
    device: str | torch.device = "cpu",
) -> Comparison:
    """Compare unlearning methods of a classifier with each other and with a model trained without the forget set.

    1. For each seed a fresh module is trained on all training data (the original), and one on the retain data alone
       (the retrained), by the same options.
    2. Each method starts from the original of each seed and sees the same batches: its field `seed` is set to that
       seed, and the global generators and those of the loaders are seeded from it.
    3. A `Search` tries `trials` values of its one hyper-parameter, as many for every method, and keeps the one with the
       lowest mean score over the seeds (the smallest of equal ones), see `tune_by`. Test data are not looked at.
    4. What is told are the numbers of the kept values on retain, forget and test set: UA, RA, TA, MIA, and their
       average gap to the retrained model of the same seed, by which the methods are ranked; KL to the retrained; time
       and peak memory; your metrics. See `Comparison.table`.

    Each finished run is written to `out` at once, and is not run again by a later call with the same data, factory,
    options, method and versions. An interrupted comparison goes on where it stopped.

    Args:
        module_factory: Makes a fresh LightningModule that maps `x` to logits `[N, K]`; batches are `(x, y)`.
        datamodule: `train_dataloader()` is the retain stream; `val_dataloader()` is for tuning, `test_dataloader()` for
            the numbers. One loader each.
        forget: The data to forget, a part of the training data that is not in the retain stream: a Dataset, or a
            DataLoader.
        methods: The methods by name, or a list, named by their classes. `Search(make, low, high)` has its value chosen.
        out: A folder for models and runs.
        options: Arguments of the Trainer of the original and the retrained, such as `{"max_epochs": 12}`.
        seeds: One repetition for each.
        trials: Number of values that each `Search` tries.
        tune_by: "retrained" or "validation": by the distance from the retrained model in accuracy on retain, forget and
            validation set, or without a retrained model by the original's validation loss.
        metrics: More columns: functions of a module and its `Parts` (loaders of the four sets) that return a number.
        path_every: Steps between two points on the path of a `TrainingRun`.
        device: Where the numbers are computed, and methods that are no `TrainingRun`. Fits are where `options` say.

    Raises:
        HAMUValueError: If a method has a reserved name or two have the same, there are no seeds or no trials, or a
            loader is missing.

    Example:
        >>> from hamu_lightning.methods import SSD, FisherForgetting
        >>> methods = {"SSD": Search(SSD, 0.3, 5.0), "Fisher noise": Search(FisherForgetting, 1e-12, 1e-8)}
        >>> # print(compare(MyModule, datamodule, forget, methods, out="runs", options={"max_epochs": 12}).table())
    """
    check_type("module_factory", module_factory, Callable, "a function that makes a fresh LightningModule")
    check_type("methods", methods, Mapping | Sequence, "a dict of methods by name, or a list of methods")
    check_type("out", out, str | Path, "a folder")
    check_type("options", options, Mapping | None, "a dict of arguments of the Trainer")
    check_type("metrics", metrics, Mapping | None, "a dict of functions by name")
    check_type("datamodule", datamodule, DataSource, "a LightningDataModule, or an object with `train_dataloader()`")
    named = _name(methods)
    _check(named, seeds, trials, tune_by, path_every)
    folder, options, metrics = Path(out), dict(options or {}), dict(metrics or {})
    parts = _find_parts(datamodule, forget)
    contents = [hash_batches(part) for part in (parts.retain, parts.forget, parts.val, parts.test)]
    key = fingerprint(contents, module_factory, options, metrics, tune_by, path_every, str(device))
    place = torch.device(device)
    problem = Problem(
        module_factory, datamodule, forget, parts, options, metrics, tune_by, path_every, place, folder, key
    )
    runs = [run for seed in seeds for run in _run_seed(Bench(problem, seed), named, trials)]
    return Comparison(runs, {name: _choose(runs, name) for name in (*REFERENCES, *named)}, tune_by)


def _run_seed(bench: Bench, methods: Mapping[str, Method | Search], trials: int) -> list[Run]:
    runs = list(bench.references)
    for name, method in methods.items():
        values: list[Any] = method.values(trials) if isinstance(method, Search) else [None]
        for trial, value in enumerate(values):
            made = method.make(value) if isinstance(method, Search) else method
            runs.append(bench.run(name, trial, value, made))
            rank_zero_info(f"{name}, seed {runs[-1].seed}, trial {trial + 1} of {len(values)}: {runs[-1].score:.4f}")
    return runs


def _choose(runs: Sequence[Run], name: str) -> int:
    """The trial with the lowest mean score over the seeds."""
    trials = {run.trial for run in runs if run.name == name}
    return min(sorted(trials), key=lambda t: mean(run.score for run in runs if (run.name, run.trial) == (name, t)))


def _name(methods: Mapping[str, Method | Search] | Sequence[Method]) -> dict[str, Method | Search]:
    if isinstance(methods, Mapping):
        return dict(methods)
    names = [getattr(method, "__name__", type(method).__name__) for method in methods]
    if len(set(names)) < len(names):
        raise HAMUValueError(f"Expected methods of different classes, but got {names}. Give a dict of names.")
    return dict(zip(names, methods, strict=True))


def _check(methods: Mapping[str, Any], seeds: Sequence[int], trials: int, tune_by: str, path_every: int) -> None:
    if reserved := set(methods) & set(REFERENCES):
        raise HAMUValueError(f"Expected other names than {sorted(reserved)}, which the two references have.")
    check_type("seeds", seeds, Sequence, "a list of seeds")
    if not seeds or len({check_seed(seed, "seeds") for seed in seeds}) < len(seeds):
        raise HAMUValueError(f"Expected different `seeds`, at least one, but got {list(seeds)}.")
    check_count("trials", trials)
    check_count("path_every", path_every)
    check_choice("tune_by", tune_by, get_args(TuneBy))
    for name, method in methods.items():
        check_type("methods", name, str, "a dict of methods by name, or a list of methods")
        check_type(f"methods[{name!r}]", method, Callable | Search, "a method, or a Search for one")


def _find_parts(datamodule: DataSource, forget: Forget) -> Parts:
    if isinstance(datamodule, LightningDataModule):
        datamodule.prepare_data()
        datamodule.setup("fit")
        datamodule.setup("test")
    names = ("val_dataloader", "test_dataloader")
    missing = [name for name in names if not callable(getattr(datamodule, name, None))]
    if missing:
        raise HAMUValueError(
            f"Expected `datamodule` to have `{missing[0]}()`, but {type(datamodule).__name__} has none. Tuning needs "
            "validation data, and the numbers need test data that tuning has not seen."
        )
    retain = datamodule.train_dataloader()
    sources = (retain, forget, *(getattr(datamodule, name)() for name in names))
    return Parts(*(hooked(datamodule, in_order(source, like=retain)) for source in sources))
