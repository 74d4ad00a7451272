"""The pictures of the findings that the report has none for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from unlearning_runs import Run

from hamu_lightning.optim import StepReport
from hamu_lightning.report._figures import BLACK, BLUE, GREEN, GREY, ORANGE, make_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (BLACK, BLUE, GREEN, ORANGE, "#CC79A7", "#56B4E9")
_MARKERS = ("o", "v", "D", "^", "s", "p")


def draw_hardness(rhos: Sequence[float], curves: Mapping[str, Mapping[str, list[list[float]]]]) -> Figure:
    """Draw readings of the hardness against rho, each in units of its value at the largest rho.

    Args:
        rhos: The shares.
        curves: For each stage and each reading one series per seed.
    """
    figure = make_figure(4.6 * len(curves), 4.8)
    panels = np.atleast_1d(figure.subplots(1, len(curves), sharey=True))
    names = list(dict.fromkeys(name for readings in curves.values() for name in readings))
    for axes, (stage, readings) in zip(panels, curves.items(), strict=True):
        style_axes(axes, f"{stage} original", "rho: share drawn from all samples", "")
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", zorder=1, label="a straight line")
        for name, series in readings.items():
            number = names.index(name)
            scaled = [np.asarray(values) / abs(values[-1]) for values in series]
            # Side by side, so that no bar hides another.
            places = np.asarray(rhos) + 0.015 * (number - len(names) / 2)
            _draw_spread(axes, number, places, np.asarray(scaled), name)
        axes.set_ylim(-1.1, 1.9)
    panels[0].set_ylabel("hardness / hardness at rho = 1")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def draw_quotas(shares: Sequence[float], curves: Mapping[str, list[list[float]]]) -> Figure:
    """Draw what was given against what was asked, both in units of the original's capacity.

    Args:
        shares: What was asked.
        curves: For each setting one series per seed.
    """
    figure = make_figure(6.4, 4.8)
    axes = figure.add_subplot()
    style_axes(
        axes, "HAMU-Q gives what is asked", "Q/lr, in units of the capacity", "forget improvement, in the same units"
    )
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="as asked")
    for number, (name, series) in enumerate(curves.items()):
        _draw_spread(axes, number, np.asarray(shares), np.asarray(series), name)
    axes.set_ylim(top=1.6)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def draw_bounds(runs: Mapping[str, Run], paper_bound: Callable[[StepReport], Tensor]) -> Figure:
    """Draw what can be had without harm against what is asked, by both rules, in units of the quota.

    Args:
        runs: For each forget set a run that was not stopped.
        paper_bound: The paper's bound of a step.
    """
    columns = -(-len(runs) // 2)
    figure = make_figure(3.4 * columns, 6.6)
    panels = figure.subplots(2, columns, sharex=True, squeeze=False).T.flatten()
    for axes, (title, run) in zip(panels, runs.items(), strict=True):
        steps = np.arange(1, len(run.reports) + 1)
        quota = np.array([float(r.coefficients.total_quota) for r in run.reports])
        lines: dict[str, tuple[str, Any]] = {
            "joint certificate F": (BLUE, [float(r.coefficients.feasible_improvement) for r in run.reports]),
            "the paper's bound": (ORANGE, [float(paper_bound(r)) for r in run.reports]),
        }
        style_axes(axes, title, "step", "")
        axes.axhline(1, color=BLACK, linewidth=1, linestyle="--", label="the quota: below it, the rule stops")
        for name, (colour, bounds) in lines.items():
            axes.plot(steps, bounds / quota, color=colour, label=name)
        axes.set_ylim(0, max(1.2, 1.1 * float(np.max(np.asarray([bounds for _, bounds in lines.values()]) / quota))))
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels[:2]:
        axes.set_ylabel("harmless forgetting / quota")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_spread(axes: Axes, number: int, x: Any, series: Any, name: str) -> None:
    """A line through the means over the seeds, `[seeds, n]`, and a bar for the range."""
    middle = series.mean(axis=0)
    bars = np.stack((middle - series.min(axis=0), series.max(axis=0) - middle))
    axes.errorbar(
        x,
        middle,
        bars,
        color=_COLOURS[number],
        marker=_MARKERS[number],
        markersize=5,
        capsize=2,
        label=name,
        alpha=0.85,
    )
