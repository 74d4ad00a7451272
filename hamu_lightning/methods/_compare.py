"""Methods side by side: the same models, the same batches, the same number of trials."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias, get_args

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_info

from hamu_lightning.checks import check_choice, check_count, check_seed, check_type
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.loaders import in_order
from hamu_lightning.methods._bench import Bench
from hamu_lightning.methods._comparison import REFERENCES, Comparison
from hamu_lightning.methods._data import hooked
from hamu_lightning.methods._evaluation import Parts
from hamu_lightning.methods._fingerprint import fingerprint, hash_batches
from hamu_lightning.methods._floor import Pool
from hamu_lightning.methods._problem import Problem, Run
from hamu_lightning.methods._protocol import DataSource, Forget, Method
from hamu_lightning.methods._tuning import Search, TuneBy

Metric: TypeAlias = Callable[[LightningModule, Parts], float]
# Where the seeds begin that are for tuning and for the pool. More seeds to report leave them as they are.
_TUNE_FROM, _POOL_FROM = 1000, 2000
_MOST_TO_TUNE = 2


def compare(
    module_factory: Callable[[], LightningModule],
    datamodule: DataSource,
    forget: Forget,
    methods: Mapping[str, Method | Search] | Sequence[Method],
    *,
    out: str | Path,
    options: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    tune_seeds: Sequence[int] | None = None,
    pool: int = 4,
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
       lowest mean score over `tune_seeds` (the smallest of equal ones), see `tune_by`. Test data are not looked at.
    4. What is told are the numbers of the kept values with `seeds`, which chose nothing: UA, RA, TA, MIA, and their
       average gap to the retrained model of the same seed; distances from a pool of models that were retrained with
       other seeds; time and peak memory; your metrics. See `Comparison.table`.
    5. The row "another retrained" has the same numbers of each model of the pool against the others: nobody can be
       expected to come closer. Where that is clearly less than what the original has, methods are ranked by their
       Jensen-Shannon divergence from the pool; see `Comparison.ordered_by`.

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
        tune_seeds: The seeds that values are chosen with. Default: two others.
        pool: Number of models that are retrained with still other seeds. 0: distances are from the retrained model of
            the same seed, and there is no row "another retrained". From 16 on, and with 16 seeds, KLOM and U-LiRA are
            told.
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
    tune_seeds, pool_seeds = _choose_seeds(seeds, tune_seeds, check_count("pool", pool, least=0))
    folder, options, metrics = Path(out), dict(options or {}), dict(metrics or {})
    parts = _find_parts(datamodule, forget)
    contents = [hash_batches(part) for part in (parts.retain, parts.forget, parts.val, parts.test)]
    key = fingerprint(contents, module_factory, options, metrics, tune_by, path_every, str(device), pool_seeds)
    place = torch.device(device)
    problem = Problem(
        module_factory, datamodule, forget, parts, options, metrics, tune_by, path_every, place, folder, key
    )
    return _run_all(problem, named, seeds, tune_seeds, Pool(problem, pool_seeds), trials)


def _run_all(
    problem: Problem,
    named: Mapping[str, Method | Search],
    seeds: Sequence[int],
    tune_seeds: Sequence[int],
    pool: Pool,
    trials: int,
) -> Comparison:
    """Choose the values with some seeds, and run what was chosen with others."""
    searches = {name: method for name, method in named.items() if isinstance(method, Search)}
    runs: list[Run] = []
    for seed in tune_seeds if searches else ():
        runs += _tune(Bench(problem, seed, pool.seen), searches, trials)
    chosen = {name: _choose(runs, name) if name in searches else 0 for name in ("retrained", "original", *named)}
    originals = []
    for seed in seeds:
        bench = Bench(problem, seed, pool.seen)
        originals.append(bench.original_seen)
        there = {run.name for run in runs if run.seed == seed}
        runs += bench.references
        runs += [_run(bench, name, named[name], chosen[name], trials) for name in named if name not in there]
    floor = pool.runs(originals)
    chosen |= {run.name: 0 for run in floor}
    return Comparison([*runs, *floor], chosen, problem.tune_by, tuple(seeds))


def _choose_seeds(
    seeds: Sequence[int], tune_seeds: Sequence[int] | None, pool: int
) -> tuple[Sequence[int], Sequence[int]]:
    """Return the seeds for tuning, and those of the pool."""
    if tune_seeds is None:
        tune_seeds = _find_free(_TUNE_FROM, min(len(seeds), _MOST_TO_TUNE), seeds)
    _check_seeds("tune_seeds", tune_seeds)
    return tune_seeds, _find_free(_POOL_FROM, pool, (*seeds, *tune_seeds))


def _find_free(start: int, count: int, taken: Sequence[int]) -> list[int]:
    return list(itertools.islice((seed for seed in itertools.count(start) if seed not in taken), count))


def _tune(bench: Bench, searches: Mapping[str, Search], trials: int) -> list[Run]:
    return [_run(bench, name, search, trial, trials) for name, search in searches.items() for trial in range(trials)]


def _run(bench: Bench, name: str, method: Method | Search, trial: int, trials: int) -> Run:
    if isinstance(method, Search):
        value = method.values(trials)[trial]
        run = bench.run(name, trial, value, method.make(value))
    else:
        trials, run = 1, bench.run(name, trial, None, method)
    rank_zero_info(f"{name}, seed {run.seed}, trial {trial + 1} of {trials}: {run.score:.4f}")
    return run


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
        raise HAMUValueError(f"Expected other names than {sorted(reserved)}, which the references have.")
    _check_seeds("seeds", seeds)
    check_count("trials", trials)
    check_count("path_every", path_every)
    check_choice("tune_by", tune_by, get_args(TuneBy))
    for name, method in methods.items():
        check_type("methods", name, str, "a dict of methods by name, or a list of methods")
        check_type(f"methods[{name!r}]", method, Callable | Search, "a method, or a Search for one")


def _check_seeds(name: str, seeds: Sequence[int]) -> None:
    check_type(name, seeds, Sequence, "a list of seeds")
    if not seeds or len({check_seed(seed, name) for seed in seeds}) < len(seeds):
        raise HAMUValueError(f"Expected different `{name}`, at least one, but got {list(seeds)}.")


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
