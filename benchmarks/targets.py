"""Forget to a target with several seeds and learning rates, with and without verified steps; tables in Markdown.

python benchmarks/targets.py            # docs/targets.md; about 40 minutes on one core
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from evaluation import Row, evaluate, make_row
from quickstart import Data, fit, load_data, parse_args, prepare, train

from hamu_lightning import HAMUQ, Chance, HAMUCallback, Holdout, VerifySteps
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.callbacks.goals._promises import Outcome
from hamu_lightning.rules import LearningRateRadius, Radius, RelativeRadius, TargetQuota

SETS = {"class 3": ("class", 3.0), "10 % at random": ("random", 0.1), "rho = 0.25": ("mixture", 0.25)}
LR = 0.1
LEARNING_RATE, RELATIVE = LearningRateRadius(), RelativeRadius(1e-3)


@dataclass(frozen=True)
class Case:
    """The data, the original and the retrained model of one seed."""

    data: Data
    original: Any
    retrained: Any
    seed: int
    every: Any = 1


@dataclass(frozen=True)
class Run:
    """What an unlearning run came to."""

    row: Row
    original: Row
    retrained: Row
    target: float
    steps: int
    state: dict[str, Any]
    reason: str | None
    promises: list[bool]

    @property
    def ratio(self) -> float:
        """The forget loss at the end in units of the target."""
        return self.row.forget.loss / self.target

    @property
    def retain_points(self) -> float:
        """Retain accuracy against the original's, in points."""
        return 100 * (self.row.retain.accuracy - self.original.retain.accuracy)

    @property
    def gap(self) -> float:
        """Membership AUC against the retrained model's."""
        return self.row.auc - self.retrained.auc

    @property
    def is_destroyed(self) -> bool:
        """Whether a tenth of the retain accuracy is gone, or a loss is no number."""
        return self.retain_points < -10 or not math.isfinite(self.row.retain.loss + self.row.forget.loss)


@contextmanager
def noted_promises(undoes: bool) -> Iterator[list[bool]]:
    """Write down which promises were kept; without `undoes` a broken one is accepted all the same."""
    promises: list[bool] = []
    original = Outcome.is_kept

    def is_kept(outcome: Outcome, tolerance: float) -> bool:
        promises.append(original(outcome, tolerance))
        return promises[-1] or not undoes

    Outcome.is_kept = is_kept  # type: ignore[method-assign]
    try:
        yield promises
    finally:
        Outcome.is_kept = original  # type: ignore[method-assign]


def unlearn(
    case: Case, args: argparse.Namespace, lr: float = LR, radius: Radius = RELATIVE, verifies: bool = True
) -> Run:
    """Unlearn a copy of the original."""
    module, data = copy.deepcopy(case.original), case.data
    module.lr = lr
    target = Chance(10) if data.gone else Holdout(data.val)
    rule = HAMUQ(TargetQuota(target), radius=radius)
    verify = VerifySteps(every=case.every)
    hamu = HAMUCallback(data.forget, rule, passes=PassOptions(batch_size=64), seed=case.seed, verify=verify)
    with noted_promises(verifies) as promises:
        fit(module, data.retain, args, "unlearned", max_epochs=-1, max_steps=args.steps, callbacks=[hamu])
    rows = [
        make_row(name, *(evaluate(model, part) for part in (data.retain, data.forget, data.test)), data.gone)
        for name, model in (("unlearned", module), ("original", case.original), ("retrained", case.retrained))
    ]
    state = hamu.state_dict()
    level = float(state["optimizer"]["aims"]["forget"]["target"])
    return Run(*rows, level, hamu.combined_steps, state["verifier"], hamu.stop_reason, promises)


def prepare_cases(seeds: int, trainings: int, out: str, every: Any) -> dict[str, list[list[Case]]]:
    """For each set and seed (which draws the forget set): train the original, and retrain it without the set.

    Each of them several times: a model's AUC depends on the training's own random numbers, too.
    """
    cases: dict[str, list[list[Case]]] = {name: [[] for _ in range(seeds)] for name in SETS}
    for seed in range(seeds):
        for own_seed in range(seed, seed + 100 * trainings, 100):
            args = parse_args(["--seed", str(own_seed), "--out", out])
            original = None
            for name, kind in SETS.items():
                data = load_data(kind, seed)
                original = original or train(data.train, args, "original")
                cases[name][seed].append(Case(data, original, train(data.retain, args, "retrained"), own_seed, every))
    return cases


def options(case: Case, out: str, steps: int) -> argparse.Namespace:
    """The arguments of one run."""
    return parse_args(["--seed", str(case.seed), "--out", out, "--steps", str(steps)])


def print_table(titles: list[str], lines: list[list[str]]) -> None:
    """Print Markdown."""
    print("| " + " | ".join(titles) + " |\n| --- |" + " ---: |" * (len(titles) - 1))
    print("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n", flush=True)


def each(runs: list[Any], read: Any, digits: int) -> str:
    """One number for each seed."""
    return " ".join(f"{read(run):.{digits}f}" for run in runs)


def compare_seeds(cases: dict[str, list[list[Case]]], out: str) -> None:
    """The defaults: each number for each seed, the AUC as a mean over several trainings."""
    lines, ranges = [], []
    for name, seeds in cases.items():
        runs = [[unlearn(case, options(case, out, 100)) for case in some] for some in seeds]
        first, every = [some[0] for some in runs], [run for some in runs for run in some]
        unlearned, retrained = ([[read(r).auc for r in some] for some in runs] for read in (_own, _retrained))
        lines.append(
            [
                name,
                each(first, lambda r: r.target, 3),
                each(first, lambda r: r.ratio, 2),
                each(first, lambda r: r.retain_points, 1),
                each(unlearned, mean, 2),
                each(retrained, mean, 2),
                each(runs, lambda some: mean(r.gap for r in some), 3),
                each(first, lambda r: r.steps, 0),
            ]
        )
        spread = [max(aucs) - min(aucs) for aucs in retrained]
        ranges.append(
            f"{name}, all {len(every)} runs: forget loss / target {min(r.ratio for r in every):.2f} to "
            f"{max(r.ratio for r in every):.2f}, worst retain {min(r.retain_points for r in every):+.1f} points, "
            f"single AUC gaps {min(r.gap for r in every):+.3f} to {max(r.gap for r in every):+.3f}; retrained models "
            f"of one seed differ by up to {max(spread):.3f}"
        )
    titles = ["set", "target", "forget loss / target", "retain acc., points", "AUC", "AUC retrained", "gap", "steps"]
    print_table(titles, lines)
    print("\n".join(ranges) + "\n", flush=True)


def _own(run: Run) -> Row:
    return run.row


def _retrained(run: Run) -> Row:
    return run.retrained


def compare_learning_rates(cases: dict[str, list[list[Case]]], out: str) -> None:
    """Both radii at four learning rates: destroyed models, the target, the retain accuracy."""
    lines = []
    # The relative radius does not depend on the learning rate: once is enough to see it.
    rates = [("learning rate", LEARNING_RATE, factor) for factor in (0.1, 1, 10, 100)] + [("relative", RELATIVE, 100)]
    for title, radius, factor in rates:
        for name, some in cases.items():
            runs = [unlearn(case, options(case, out, 100), LR * factor, radius) for case, *_ in some]
            reached = sum(r.reason is not None and r.reason.startswith("target") for r in runs)
            lines.append(
                [
                    f"{title}, {factor:g}x, {name}",
                    str(sum(r.is_destroyed for r in runs)),
                    f"{reached} of {len(runs)}",
                    each(runs, lambda r: r.ratio, 2),
                    f"{min(r.retain_points for r in runs):+.1f}",
                ]
            )
    print_table(
        ["radius, learning rate, set", "destroyed", "target reached", "forget loss / target", "worst retain, points"],
        lines,
    )


def compare_verification(cases: dict[str, list[list[Case]]], out: str) -> None:
    """The learning-rate radius at ten and a hundred times the learning rate, up to 500 steps of the first seed."""
    lines = []
    for factor in (10, 100):
        for name, ((case, *_), *_) in cases.items():
            for verifies in (True, False):
                run = unlearn(case, options(case, out, 500), LR * factor, LEARNING_RATE, verifies)
                state, first = run.state, run.state["kept"] - run.state["retried"]
                share = [
                    f"{100 * n / max(state['verified'], 1):.0f} %" for n in (first, state["retried"], state["dropped"])
                ]
                lines.append(
                    [
                        f"{factor}x, {name}, {'verified' if verifies else 'only measured'}",
                        *(share if verifies else ["", "", ""]),
                        f"{100 * mean(run.promises):.0f} %",
                        f"{run.steps}" + ("" if run.reason and run.reason.startswith("target") else " (not reached)"),
                        f"{run.ratio:.3g}",
                        f"{run.retain_points:+.1f}",
                    ]
                )
    print_table(
        [
            "learning rate, set, steps",
            "kept at once",
            "retried",
            "dropped",
            "promises kept",
            "steps to the target",
            "forget loss / target",
            "retain acc., points",
        ],
        lines,
    )


TABLES = {"seeds": compare_seeds, "verification": compare_verification, "rates": compare_learning_rates}


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description="The tables of docs/targets.md.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trainings", type=int, default=4, help="trainings of each seed, for the first table")
    parser.add_argument("--tables", nargs="*", choices=TABLES, default=list(TABLES))
    parser.add_argument("--every", default=1, type=lambda given: given if given == "auto" else int(given))
    args = parser.parse_args()
    start = time.perf_counter()
    prepare()
    with tempfile.TemporaryDirectory() as out:
        cases = prepare_cases(args.seeds, args.trainings, out, args.every)
        for name in args.tables:
            TABLES[name](cases, out)
            print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
