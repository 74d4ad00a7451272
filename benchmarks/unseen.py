"""Ways to unlearn without anything tuned, beside retrained models: one table for a set, several seeds.

    python benchmarks/unseen.py mnist1d random:0.1 --steps 30 90
    python benchmarks/unseen.py mnist1d class:5 --pairs "Unseen, 90" "Holdout or Chance, 90"
    python benchmarks/unseen.py digits class:3 --more my_ways.py --ways "Unseen" mine

A way is a function of the set and of what is forgotten that returns the arguments of `HAMUCallback` besides the data to
forget and the seed. `--more` names a file with more of them, in a dict WAYS. Models are trained once and kept in the
folder; runs are made again when the code of the package or of the way has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import runpy
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from compare import hold_out, show_progress
from forgetting import Data, parse_forget, parse_rho
from lightning.pytorch import Callback
from problems import PROBLEMS, Problem, Source, load_problem
from quickstart import prepare

import hamu_lightning
from hamu_lightning import Chance, HAMUCallback, Holdout, compare
from hamu_lightning.methods import Comparison, TrainingRun

Way: TypeAlias = Callable[[Problem, Data], Mapping[str, Any]]
TITLES = {"JS": 100, "JS_test": 100, "gap": 100, "UA": 100, "RA": 100, "TA": 100, "log_odds": 1, "surer": 100}


def holdout_or_chance(problem: Problem, data: Data) -> Mapping[str, Any]:
    """The loss of a guess for a class, that on held-out samples for others."""
    return {"target": Chance(data.classes) if data.gone else Holdout(hold_out(data))}


def unseen(problem: Problem, data: Data, **options: Any) -> Mapping[str, Any]:
    """The default for both kinds."""
    from hamu_lightning import Unseen

    return {"target": Unseen(**options) if data.gone else Unseen(data.val, **options)}


WAYS: dict[str, Way] = {"Holdout or Chance": holdout_or_chance, "Unseen": unseen}


def hash_package() -> str:
    """Return a hash of the package's source: a run with other code is another run."""
    files = sorted(Path(hamu_lightning.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def make_method(problem: Problem, data: Data, way: Way, steps: int) -> TrainingRun:
    """Make the method of a way."""
    code = hash_package()

    def make(forget: Any, seed: int) -> Callback:
        assert code  # it stands in the closure, and by that in the name of the run
        return HAMUCallback(forget, seed=seed, **way(problem, data))

    options = {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": -1, "max_steps": steps}
    return TrainingRun(make, options)


def run(args: argparse.Namespace) -> Comparison:
    """Train or read the models, run what has not been run, and read the rest."""
    problem, data = load_problem(args.set, args.forget, args.forget_seed)
    ways = {**WAYS, **(runpy.run_path(str(args.more))["WAYS"] if args.more else {})}
    methods = {
        f"{name}, {steps}": make_method(problem, data, ways[name], steps)
        for name in (ways if args.ways is None else args.ways)
        for steps in args.steps
    }
    return compare(
        problem.make_module,
        Source(data, problem.batch_size),
        data.forget,
        methods,
        out=args.out / "{}-{}-{:g}".format(args.set, *args.forget),
        options=problem.trainer_options,
        seeds=range(args.first_seed, args.first_seed + args.seeds),
        pool=args.pool,
        path_every=10,
    )


def format_pair(found: Comparison, first: str, second: str) -> str:
    """Say how two ways differ, paired by seed."""
    differences = {title: found.difference(first, second, title) for title in TITLES}
    cells = (f"{t} {TITLES[t] * middle:+.1f} ±{TITLES[t] * half:.1f}" for t, (middle, half) in differences.items())
    return f"{first} minus {second}: " + ", ".join(cells)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Ways to unlearn beside retrained models.")
    parser.add_argument("set", choices=PROBLEMS)
    parser.add_argument("forget", type=partial(parse_forget, classes=20), nargs="?", default=("random", 0.1))
    parser.add_argument("--rho", dest="forget", type=parse_rho, help="share at random, the rest of one class")
    parser.add_argument("--ways", nargs="*", metavar="NAME", help="some of the ways (default: all)")
    parser.add_argument("--more", type=Path, metavar="FILE", help="a Python file with more ways in a dict WAYS")
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 90])
    parser.add_argument("--seeds", type=int, default=6, help="number of seeds that are reported")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--forget-seed", type=int, default=0, help="draws the forget set, one for all seeds")
    parser.add_argument("--pool", type=int, default=8, help="retrained models with other seeds")
    parser.add_argument("--pairs", nargs="*", default=[], metavar="NAME", help="ways to compare, two by two")
    parser.add_argument("--out", type=Path, default=Path("study_out"))
    return parser.parse_args()


def main() -> None:
    """Run, and print the table."""
    args = parse_args()
    prepare()
    show_progress()
    found = run(args)
    print(f"\n{found.table()}\n")
    for first, second in zip(args.pairs[::2], args.pairs[1::2], strict=True):
        print(format_pair(found, first, second))


if __name__ == "__main__":
    main()
