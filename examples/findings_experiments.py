"""The experiments behind the paper's findings: a function each, from its runs to a table and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from findings_numbers import (
    actual_share,
    expected_kappa,
    fit_line,
    infeasible,
    judge_stops,
    kappa,
    paper_bound,
    passes_certificate,
    passes_paper_rule,
    pearson,
    promised_share,
    retain_at,
)
from findings_pictures import draw_bounds, draw_hardness, draw_quotas
from forgetting import MIXTURE_CLASS
from unlearning_runs import Bench, Run

from hamu_lightning import HAMUQ, HAMUU, compute_gramian
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
        "promised / asked at 0.1": promised_share(runs[SHARES.index(0.1)]),
        "blocks turned at 0.1": runs[SHARES.index(0.1)].mean(lambda report: report.share(Branch.RECTIFIED)),
    }


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
            _add(row, "promised / asked", promised_share(run))
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
                _add(row, "quota's objective, actual / asked per step", actual_share(run))
                _add(row, "step length / radius, median", median(run.lengths))
    return Finding(rows)


def _add(row: dict[str, list[float]], column: str, number: float) -> None:
    row.setdefault(column, []).append(float(number))
