"""The picture of how hard each step was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.report._figures import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    Numbers,
    as_array,
    check_shapes,
    make_figure,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_LABELS = 26
_SCALED_KAPPA = r"$\kappa \,/\, (|g_r|\,|g_f|)$"


def plot_hardness(
    kappa: Numbers,
    kappa_1: Numbers,
    kappa_2: Numbers,
    norms: Numbers,
    labels: Sequence[str],
    steps: Numbers,
    *,
    title: str = "How hard forgetting was",
) -> Figure:
    """Draw the hardness `kappa = g_r·g_f` against its two thresholds, and that of each block where there are several.

    Everything is divided by `|g_r||g_f|` of its block, so that blocks and steps of any scale compare: kappa becomes the
    cosine of the angle between the two gradients, in [-1, 1]. Below `kappa_1` the plain step on the other objective is
    enough; between the thresholds the step must be turned; above `kappa_2` the block pays with the other objective.
    Where the quota is shared by capacity, all blocks have the same scaled thresholds; otherwise the median is drawn.

    Args:
        kappa: `[S, B]`, for `S` steps and `B` blocks.
        kappa_1: `[S, B]`, the lower threshold.
        kappa_2: `[S, B]`, the upper threshold.
        norms: `[S, B]`, `|g_r||g_f|`, in the unit of kappa. Blocks with 0 are left out at that step.
        labels: The names of the `B` blocks.
        steps: `[S]`, the number of each step.
        title: The title.

    Returns:
        A figure; `figure.savefig("hardness.png")` writes it.

    Raises:
        HAMUValueError: If an array is empty or of another shape.
        MissingMatplotlibError: If matplotlib is not installed.

    Example:
        >>> figure = plot_hardness([[0.5]], [[-0.1]], [[0.9]], [[1.0]], ["global"], [1])
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['How hard forgetting was']
    """
    scale = as_array("norms", norms, 2)
    arrays = {"kappa": as_array("kappa", kappa, 2)}
    arrays |= {"kappa_1": as_array("kappa_1", kappa_1, 2), "kappa_2": as_array("kappa_2", kappa_2, 2)}
    check_shapes(scale.shape, **arrays)
    step = as_array("steps", steps, 1)
    check_shapes(scale.shape[:1], steps=step)
    if len(labels) != scale.shape[1]:
        raise HAMUValueError(f"Expected `labels` to have {scale.shape[1]} entries, but got {len(labels)}.")
    cosine, low, high = (_divide(array, scale) for array in arrays.values())
    is_one = len(labels) == 1
    figure = make_figure(8.0, 3.8 if is_one else 7.6)
    panels = figure.subplots(1 if is_one else 2, 1, sharex=True, squeeze=False, height_ratios=[1, 1.35][: 2 - is_one])
    upper = panels[0, 0]
    _draw_thresholds(upper, step, cosine, low, high)
    style_axes(upper, title, "step" if is_one else "", _SCALED_KAPPA)
    # The legend stands between the title and the lines.
    upper.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=38)
    if not is_one:
        _draw_blocks(panels[1, 0], step, cosine, labels)
    return figure


def _divide(array: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quotient; NaN where it is not a finite number (no gradient, no radius)."""
    with np.errstate(all="ignore"):
        quotient = array / scale
    return np.where(np.isfinite(quotient), quotient, np.nan)


def _draw_thresholds(
    axes: Axes,
    step: NDArray[np.float64],
    cosine: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
) -> None:
    """Lines over the steps: `[S]` and `[S, B]`."""
    tenth, middle, ninetieth = (_percentile(cosine, q) for q in (10, 50, 90))
    first, second = _percentile(low, 50), _percentile(high, 50)
    is_one = cosine.shape[1] == 1
    axes.plot(step, middle, color=BLACK, linewidth=1.6, label=r"$\kappa$" if is_one else r"$\kappa$, median block")
    if not is_one:
        shade: dict[str, Any] = {"color": BLACK, "alpha": 0.15, "linewidth": 0}
        axes.fill_between(step, tenth, ninetieth, label=r"$\kappa$, 80 % of the blocks", **shade)
    payer = "retain must pay" if is_one else "a block must pay"
    axes.plot(step, second, color=ORANGE, linestyle="--", label=rf"$\kappa_2$: above it, {payer}")
    axes.plot(step, first, color=BLUE, linestyle="-.", label=r"$\kappa_1$: below it, the plain step is enough")
    if (first < -1).any():
        hatch: dict[str, Any] = {"facecolor": "none", "edgecolor": "0.8", "hatch": "///", "linewidth": 0, "zorder": 0}
        is_beyond = first < -1
        axes.fill_between(step, -1.05, 1.05, where=is_beyond, step="mid", label="quota beyond the radius", **hatch)
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    axes.set_ylim(-1.05, 1.05)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(-0.01, 1.0))


def _percentile(array: NDArray[np.float64], q: float) -> NDArray[np.float64]:
    """Over the blocks that have a number, NaN where none has: `[S, B]` to `[S]`."""
    result = np.full(array.shape[0], np.nan)
    for row, values in enumerate(array):
        values = values[~np.isnan(values)]
        if values.size:
            result[row] = np.percentile(values, q)
    return result


def _draw_blocks(axes: Axes, step: NDArray[np.float64], cosine: NDArray[np.float64], labels: Sequence[str]) -> None:
    """The heatmap: one row for each block, the first layer on top."""
    n_blocks = len(labels)
    style_axes(axes, "The same for each block of weights", "step", "")
    axes.grid(visible=False)
    axes.set_facecolor("0.8")  # blocks without a number
    # PuOr is told apart with any colour vision; white is no conflict and no help.
    mesh = axes.pcolormesh(_edges(step), np.arange(n_blocks + 1), cosine.T, cmap="PuOr_r", vmin=-1, vmax=1)
    mesh.set_rasterized(True)
    shown = range(0, n_blocks, -(-n_blocks // _MOST_LABELS))
    axes.set_yticks([i + 0.5 for i in shown], [labels[i] for i in shown], fontsize=7)
    axes.invert_yaxis()
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01, aspect=30)
    bar.set_label(f"{_SCALED_KAPPA}\nhelps   <   0   <   conflicts")


def _edges(step: NDArray[np.float64]) -> NDArray[np.float64]:
    """Borders of the columns, `[S + 1]`, halfway between the steps."""
    if step.size == 1:
        return np.array([step[0] - 0.5, step[0] + 0.5])
    middle = (step[1:] + step[:-1]) / 2
    return np.concatenate(([2 * step[0] - middle[0]], middle, [2 * step[-1] - middle[-1]]))
