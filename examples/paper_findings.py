"""The findings of the HAMU paper (Chen et al., ICML 2026, arXiv 2606.02119) on a small data set.

    python examples/paper_findings.py                               # all of them, on the 8x8 digits
    python examples/paper_findings.py --findings hardness quotas    # two of them
    python examples/paper_findings.py --cifar10 cifar-10-batches-bin

docs/paper_findings.md holds the results, and what they say about the paper's.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from cifar10 import CIFAR10Classifier, load_cifar10
from digits import DigitsClassifier, load_splits
from findings_pictures import draw_bounds, draw_hardness, draw_quotas
from quickstart import MIXTURE_CLASS
from torch import Tensor
from unlearning_runs import Bench, Run, Task

from hamu_lightning import HAMUQ, HAMUU, compute_gramian
from hamu_lightning.optim import StepReport
from hamu_lightning.report import plot_comparison
from hamu_lightning.rules import (
    GRU,
    MGDA,
    AbsoluteQuota,
    Branch,
    FineTune,
    GradAscent,
    GradDiff,
    MUNBa,
    NGDiff,
    PCGrad,
    RelativeQuota,
    Rule,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RHOS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Q/lr as a share of what the original can give (`Case.capacity`): the paper's numbers, 0.5 and 0 to 0.9, without the
# scale of its model.
SHARE = 0.5
# HAMU-U's radius, lr |g_f|, grows as the model forgets: at the usual learning rate its runs end in no numbers.
SLOW = 0.1
SHARES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
# A hardness beyond this is that of a destroyed model: nothing to draw.
_DIVERGED = 1e3
# Stage of the original, learning rate in units of the usual one, rho.
QUOTA_SETTINGS = (
    ("early", 0.25, 0.0),
    ("early", 1.0, 0.0),
    ("early", 5.0, 0.0),
    ("converged", 1.0, 0.0),
    ("early", 1.0, 0.75),
    ("converged", 1.0, 0.75),
)
BATCH_SIZES = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Finding:
    """What a finding came to.

    Args:
        rows: For each row of the table and each of its columns one number per seed.
        figures: For each picture what draws it.
    """

    rows: dict[str, dict[str, list[float]]]
    figures: dict[str, Callable[[], Figure]] = field(default_factory=dict)


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the correlation of two series."""
    return float(np.corrcoef(x, y)[0, 1])


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Return slope, intercept and R^2 of the least-squares line."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = np.asarray(y) - (slope * np.asarray(x) + intercept)
    return float(slope), float(intercept), float(1 - (rest**2).sum() / ((y - np.mean(y)) ** 2).sum())


def expected_kappa(gramian: Tensor, share: float, rho: float) -> float:
    """Return `g_r·g_f` of the mean gradients of a mixture, as if both sets were infinitely large.

    The forget gradient is `f = (1 - rho) c + rho g`, of the class `c` and of all samples `g`. What is retained is the
    rest, `r = (g - share f) / (1 - share)`: so kappa is a quadratic function of rho, not a linear one.

    Args:
        gramian: `[2, 2]`, of `c` and `g`.
        share: Of all samples, how many are forgotten.
        rho: Of these, how many are drawn from all samples.
    """
    forget = gramian.new_tensor([1 - rho, rho])
    retain = (gramian.new_tensor([0.0, 1.0]) - share * forget) / (1 - share)
    return float(retain @ gramian @ forget)


def paper_bound(report: StepReport) -> Tensor:
    """Return what the paper's stopping rule compares with the quota, 0-d, loss units per step.

    The sum over the blocks of `R sqrt(ff - rf^2/rr)` (HAMU-U: with rr and ff exchanged), also where `rf < 0`, where a
    block can give `R sqrt(ff)` without harm.
    """
    step = report.coefficients
    bound, free = step.constrained, 1 - step.constrained
    square, other, product = step.gramian[:, bound, bound], step.gramian[:, free, free], step.gramian[:, 0, 1]
    lost = torch.where(other > 0, product.square() / torch.where(other > 0, other, 1), 0)
    return (step.radius * (square - lost).clamp(min=0).sqrt()).sum()


def passes_paper_rule(report: StepReport) -> bool:
    """Whether the paper's stopping rule lets a step pass."""
    return bool(paper_bound(report) >= report.coefficients.total_quota)


def passes_certificate(report: StepReport) -> bool:
    """Whether ours does: some step inside the radii can give the quota without harm."""
    return bool(report.coefficients.margin >= 0)


def infeasible(report: StepReport) -> Tensor:
    """The share of blocks whose quota exceeds what their radius allows."""
    return 1 - report.coefficients.block_feasible.double().mean()


def kappa(report: StepReport) -> Tensor:
    """The hardness of the whole model."""
    return report.kappa.sum()


def measure_hardness(bench: Bench, seed: int, stage: str) -> dict[str, list[float]]:
    """Return several readings of the hardness, each for every rho."""
    cases = [bench.case(seed, rho, stage) for rho in RHOS]
    quota = SHARE * min(case.capacity for case in cases) * cases[0].lr
    q, u = ([bench.unlearn(case, rule(quota)) for case in cases] for rule in (HAMUQ, HAMUU))
    lr = SLOW * cases[0].lr
    slow_u = [bench.unlearn(case, HAMUU(SLOW * quota), lr=lr) for case in cases]
    task, original = bench.task, cases[0].original
    everything = torch.arange(len(task.labels), device=task.labels.device)
    of_class = everything[task.labels == MIXTURE_CLASS]
    gramian = compute_gramian(task.gradient(original, of_class), task.gradient(original, everything)).sum(dim=0)
    share = len(of_class) / len(everything)
    return {
        "original, expected": [expected_kappa(gramian, share, rho) for rho in RHOS],
        "original, all samples": [case.gramian.sum(dim=0)[0, 1].item() for case in cases],
        "HAMU-Q, mean of the steps": [run.mean(kappa) for run in q],
        "HAMU-U, mean of the steps": [run.mean(kappa) for run in u],
        f"HAMU-U, lr x {SLOW:g}, mean of the steps": [run.mean(kappa) for run in slow_u],
        "HAMU-Q, mean cosine": [run.mean(lambda report: report.total_cosine) for run in q],
    }


def hardness(bench: Bench) -> Finding:
    """Mean kappa against rho: a forget set that looks more like what is retained is harder."""
    rows: dict[str, dict[str, list[float]]] = {}
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for stage in bench.task.epochs:
        by_seed = [measure_hardness(bench, seed, stage) for seed in bench.seeds]
        curves[stage] = {}
        for name in by_seed[0]:
            series = [readings[name] for readings in by_seed]
            if np.abs(series).max() < _DIVERGED:
                curves[stage][name] = series
            columns = {f"rho = {rho:g}": [values[n] for values in series] for n, rho in enumerate(RHOS)}
            of_mean = np.mean([np.asarray(values) / abs(values[-1]) for values in series], axis=0)
            rows[f"{stage}: {name}"] = {
                "correlation": [pearson(RHOS, values) for values in series],
                "of the mean curve": [pearson(RHOS, of_mean.tolist())],
                **columns,
            }
    return Finding(rows, {"hardness": lambda: draw_hardness(RHOS, curves)})


def quotas(bench: Bench) -> Finding:
    """Forget improvement against Q/lr: the step gives what was asked."""
    rows: dict[str, dict[str, list[float]]] = {}
    curves: dict[str, list[list[float]]] = {}
    for stage, factor, rho in QUOTA_SETTINGS:
        for case in bench.cases(rho, stage):
            lr = factor * case.lr
            name = f"rho = {rho:g}, {stage}, lr {lr:g}"
            runs = [bench.unlearn(case, HAMUQ(share * case.capacity * lr), lr=lr) for share in SHARES]
            gains = [run.forget_improvement / (lr * case.capacity * bench.steps) for run in runs]
            curves.setdefault(name, []).append(gains)
            row = rows.setdefault(name, {})
            for title, number in judge_line(runs, gains).items():
                _add(row, title, number)
            _add(row, "given / asked at 0.5", gains[SHARES.index(0.5)] / 0.5)
            _add(row, "forget loss rises by, at 0.9", runs[-1].forget_improvement)
            _add(row, "blocks infeasible at 0.9", runs[-1].mean(infeasible))
    return Finding(rows, {"quotas": lambda: draw_quotas(SHARES, curves)})


def judge_line(runs: Sequence[Run], gains: Sequence[float]) -> dict[str, float]:
    """Fit what was given against what was asked, and against what the steps promised: a quota is a lower bound."""
    slope, intercept, r_squared = fit_line(SHARES, gains)
    promised = [run.mean(lambda report: report.coefficients.forget_improvement) for run in runs]
    return {
        "R^2": r_squared,
        "slope": slope,
        "intercept": intercept,
        "R^2 against promised": fit_line(promised, gains)[2],
        "promised / asked at 0.1": _promised(runs[SHARES.index(0.1)]),
        "blocks turned at 0.1": runs[SHARES.index(0.1)].mean(lambda report: report.share(Branch.RECTIFIED)),
    }


def _promised(run: Run) -> float:
    """What the steps promised of what they were asked for, to first order on their own batches."""
    asked = run.mean(lambda report: report.coefficients.total_quota)
    return run.mean(lambda report: report.coefficients.forget_improvement) / asked


def make_methods(quota: float) -> dict[str, Rule]:
    """Return every rule for two gradients."""
    return {
        "HAMU-Q": HAMUQ(quota),
        "HAMU-U": HAMUU(quota),
        "FineTune": FineTune(),
        "GradAscent": GradAscent(),
        "GradDiff": GradDiff(),
        "PCGrad": PCGrad(),
        "GRU": GRU(),
        "NGDiff": NGDiff(),
        "MGDA": MGDA(),
        "MUNBa": MUNBa(),
    }


def retain_at(run: Run, level: float) -> float:
    """Return the retain improvement where the forget improvement first reached a level; NaN if it did not."""
    for (_, r0, f0), (_, r1, f1) in zip(run.path, run.path[1:], strict=False):
        if f0 < level <= f1:
            return r0 + (r1 - r0) * (level - f0) / (f1 - f0)
    return math.nan


def methods(bench: Bench) -> Finding:
    """Both objectives for every method, at the same learning rate and at the same forgetting."""
    rows: dict[str, dict[str, list[float]]] = {}
    figures: dict[str, Callable[[], Figure]] = {}
    for rho in (0.0, 0.75):
        paths = {}
        for case in bench.cases(rho):
            # Some methods' steps grow with the forget gradient: at the usual learning rate most runs explode.
            lr = 0.25 * case.lr
            quota = SHARE * case.capacity * lr
            for name, rule in make_methods(quota).items():
                run = bench.unlearn(case, rule, lr=lr, measure_every=2)
                row = rows.setdefault(f"rho = {rho:g}, {name}", {})
                _add(row, "forget improvement", run.forget_improvement)
                _add(row, "retain improvement", run.retain_improvement)
                # The runs are measured every few steps: HAMU-Q itself may end a little below what it was asked for.
                _add(row, "retain improvement at equal forgetting", retain_at(run, 0.9 * bench.steps * quota))
                paths.setdefault(name, [point[1:] for point in run.path])
        title = f"rho = {rho:g}: what forgetting costs, by method"
        figures[f"methods-{rho:g}"] = partial(plot_comparison, paths, title=title)
    return Finding(rows, figures)


def allocations(bench: Bench) -> Finding:
    """HAMU-Q per tensor, per layer and as a whole, and four ways to share the quota."""
    variants: dict[str, dict[str, Any]] = {
        "tensor, proportional (the paper's)": {},
        "layer, proportional": {"blocks": "layer"},
        "global": {"blocks": "global"},
        "tensor, uniform": {"allocation": "uniform"},
        "tensor, softmax": {"allocation": "softmax"},
        "tensor, optimal": {"allocation": "optimal"},
    }
    rows: dict[str, dict[str, list[float]]] = {}
    for rho, share in ((0.0, SHARE), (0.75, SHARE), (0.75, 0.9)):
        for case in bench.cases(rho):
            quota = share * case.capacity * case.lr
            for name, options in variants.items():
                run = bench.unlearn(case, HAMUQ(quota, **options))
                row = rows.setdefault(f"rho = {rho:g}, Q = {share:g} of the capacity, {name}", {})
                _add(row, "forget improvement / asked", run.forget_improvement / (bench.steps * quota))
                _add(row, "retain improvement", run.retain_improvement)
                promised = run.mean(lambda report: report.coefficients.retain_improvement)
                _add(row, "retain improvement / Q, promised per step", promised / quota)
                _add(row, "blocks infeasible", run.mean(infeasible))
    return Finding(rows)


def stopping(bench: Bench) -> Finding:
    """With and without a stopping rule: the paper's, and the joint certificate."""
    rules = {"none": None, "the paper's": passes_paper_rule, "joint certificate": passes_certificate}
    rows: dict[str, dict[str, list[float]]] = {}
    shown: dict[str, Run] = {}
    for rho in (0.0, 0.5, 1.0):
        for case in bench.cases(rho):
            for quota_name, quota in (
                ("Q fixed", AbsoluteQuota(SHARE * case.capacity * case.lr)),
                ("Q relative", RelativeQuota(0.9)),
            ):
                for name, approve in rules.items():
                    run = bench.unlearn(case, HAMUQ(quota, allocation="optimal"), approve=approve)
                    row = rows.setdefault(f"rho = {rho:g}, {quota_name}, {name}", {})
                    _add(row, "steps", run.steps)
                    _add(row, "forget improvement", run.forget_improvement)
                    _add(row, "retain improvement", run.retain_improvement)
                    if approve is None:
                        shown.setdefault(f"rho = {rho:g}, {quota_name}", run)
                        for title, number in judge_stops(run).items():
                            _add(row, title, number)
    return Finding(rows, {"stopping": lambda: draw_bounds(shown, paper_bound)})


def judge_stops(run: Run) -> dict[str, float]:
    """Return at which share of the steps the rules would have stopped, and how many of these stops were false.

    A stop is false where the very step that was taken gave its quota and lowered the retain loss, to first order.
    """
    steps = [report.coefficients for report in run.reports]
    by_paper = [not passes_paper_rule(report) for report in run.reports]
    by_us = [not passes_certificate(report) for report in run.reports]
    harmless = [
        bool((step.retain_improvement >= 0) & (step.forget_improvement >= step.total_quota * (1 - 1e-6)))
        for step in steps
    ]

    def share(stops: list[bool]) -> float:
        return mean(map(float, stops))

    def false(stops: list[bool]) -> float:
        judged = [is_harmless for stop, is_harmless in zip(stops, harmless, strict=True) if stop]
        return share(judged) if judged else math.nan

    return {
        "steps that the paper's stops": share(by_paper),
        "of these false": false(by_paper),
        "steps that ours stops": share(by_us),
        "of these, too, false": false(by_us),
    }


def batches(bench: Bench) -> Finding:
    """HAMU-Q with batches of different sizes, of both streams."""
    rows: dict[str, dict[str, list[float]]] = {}
    for case in bench.cases(0.0):
        quota = SHARE * case.capacity * case.lr
        for size in BATCH_SIZES:
            run = bench.unlearn(case, HAMUQ(quota), batch_size=size)
            row = rows.setdefault(f"{size}", {})
            _add(row, "forget improvement / asked", run.forget_improvement / (bench.steps * quota))
            _add(row, "retain improvement", run.retain_improvement)
            _add(row, "promised / asked", _promised(run))
            _add(row, "blocks infeasible", run.mean(infeasible))
            hardnesses = [float(kappa(report)) for report in run.reports]
            _add(row, "mean kappa", mean(hardnesses))
            _add(row, "spread of kappa over the steps", stdev(hardnesses))
    return Finding(rows)


def bases(bench: Bench) -> Finding:
    """SGD, momentum and AdamW as base, with and without `exact=True`."""
    adamw = torch.optim.AdamW
    settings: dict[str, tuple[Any, float, bool]] = {
        "SGD": (torch.optim.SGD, 1.0, False),
        "SGD, momentum 0.9": (partial(torch.optim.SGD, momentum=0.9), 1.0, False),
        "AdamW": (adamw, 1.0, False),
        "AdamW, lr x 0.01": (adamw, 0.01, False),
        "AdamW, exact": (adamw, 1.0, True),
    }
    rows: dict[str, dict[str, list[float]]] = {}
    for title, rule, speed in (("HAMU-Q", HAMUQ, 1.0), (f"HAMU-U, lr x {SLOW:g}", HAMUU, SLOW)):
        for case in bench.cases(0.0):
            for name, (base, factor, exact) in settings.items():
                lr = speed * factor * case.lr
                run = bench.unlearn(case, rule(SHARE * case.capacity * lr), base=base, lr=lr, exact=exact)
                row = rows.setdefault(f"{title}, {name}", {})
                _add(row, "forget improvement", run.forget_improvement)
                _add(row, "retain improvement", run.retain_improvement)
                _add(row, "quota's objective, actual / asked per step", _actual(run))
                _add(row, "step length / radius, median", median(run.lengths))
    return Finding(rows)


def _actual(run: Run) -> float:
    """What the weights' actual change did for the objective of the quota, to first order, of what was asked."""

    def read(report: StepReport) -> Tensor:
        assert report.actual_improvements is not None
        return report.actual_improvements[report.coefficients.constrained]

    return run.mean(read) / run.mean(lambda report: report.coefficients.total_quota)


def _add(row: dict[str, list[float]], column: str, number: float) -> None:
    row.setdefault(column, []).append(float(number))


FINDINGS: dict[str, Callable[[Bench], Finding]] = {
    "hardness": hardness,
    "quotas": quotas,
    "methods": methods,
    "allocations": allocations,
    "stopping": stopping,
    "batches": batches,
    "bases": bases,
}


def format_cell(numbers: Sequence[float]) -> str:
    """Return mean ± standard deviation over the seeds that have a number, and how many have."""
    known = [number for number in numbers if math.isfinite(number)]
    if not known:
        return ""
    spread = f" ± {float(f'{stdev(known):.1g}'):g}" if len(known) > 1 else ""
    return f"{mean(known):.3g}{spread}" + (f" ({len(known)} of {len(numbers)})" if len(known) < len(numbers) else "")


def format_table(name: str, finding: Finding) -> str:
    """Return the table of a finding in Markdown."""
    titles = list(dict.fromkeys(column for row in finding.rows.values() for column in row))
    lines = [f"| {' | '.join([name, *titles])} |", "| --- |" + " ---: |" * len(titles)]
    for label, row in finding.rows.items():
        lines.append(f"| {' | '.join([label, *(format_cell(row.get(column, [])) for column in titles)])} |")
    return "\n".join(lines)


def make_digits() -> Task:
    """The training split of the digits."""
    images, labels = load_splits()[0].tensors
    return Task(
        "digits", images, labels, DigitsClassifier, {"early": 4, "converged": 12}, {"early": 0.002, "converged": 0.06}
    )


def make_cifar10(folder: Path) -> Task:
    """The training set of CIFAR-10, on an accelerator where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = (tensor.to(device) for tensor in load_cifar10(folder))
    return Task(
        "cifar10", images, labels, CIFAR10Classifier, {"early": 5, "converged": 30}, {"early": 0.01, "converged": 0.01}
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="The findings of the HAMU paper on a small data set.")
    parser.add_argument("--findings", nargs="+", choices=FINDINGS, default=list(FINDINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="steps of an unlearning run")
    parser.add_argument("--batch-size", type=int, default=128, help="samples of a batch, of each of the two streams")
    parser.add_argument("--cifar10", type=Path, metavar="DIR", help="a folder with CIFAR-10's binary files")
    parser.add_argument(
        "--out", type=Path, default=Path("paper_findings_out"), help="for pictures, numbers and originals"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each finding, and write its pictures and the numbers of each seed."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    task = make_cifar10(args.cifar10) if args.cifar10 else make_digits()
    bench = Bench(task, range(args.seeds), args.out, args.steps, args.batch_size)
    for name in args.findings:
        start, processor = time.perf_counter(), time.process_time()
        finding = FINDINGS[name](bench)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{name}.json").write_text(json.dumps(finding.rows, indent=1))
        for title, draw in finding.figures.items():
            draw().savefig(args.out / f"{title}.png")
        seconds = f"{time.perf_counter() - start:.0f} s, {time.process_time() - processor:.0f} s of one core"
        print(f"{format_table(name, finding)}\n\n({seconds})\n", flush=True)


if __name__ == "__main__":
    main()
