"""The numbers by which the paper's findings are judged: its formulas, and ours beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

import numpy as np
import torch
from torch import Tensor
from unlearning_runs import Run

from hamu_lightning.optim import StepReport


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


def promised_share(run: Run) -> float:
    """Return what the steps promised of what they were asked for, to first order on their own batches."""
    asked = run.mean(lambda report: report.coefficients.total_quota)
    return run.mean(lambda report: report.coefficients.forget_improvement) / asked


def retain_at(run: Run, level: float) -> float:
    """Return the retain improvement where the forget improvement first reached a level; NaN if it did not."""
    for (_, r0, f0), (_, r1, f1) in zip(run.path, run.path[1:], strict=False):
        if f0 < level <= f1:
            return r0 + (r1 - r0) * (level - f0) / (f1 - f0)
    return math.nan


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


def actual_share(run: Run) -> float:
    """Return what the weights' actual change did for the objective of the quota, to first order, of what was asked."""

    def read(report: StepReport) -> Tensor:
        assert report.actual_improvements is not None
        return report.actual_improvements[report.coefficients.constrained]

    return run.mean(read) / run.mean(lambda report: report.coefficients.total_quota)
