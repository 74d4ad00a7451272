"""The picture of which request makes the protection of which group expensive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hamu_lightning.report._figures import Numbers, as_array, check_shapes, make_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_costs(
    costs: Numbers, protected: Sequence[str], requests: Sequence[str], *, title: str = "What protection costs, and why"
) -> Figure:
    """Draw the part of each protected group's price that each request causes.

    Args:
        costs: `[n_protected, n_forget]`, as `GroupCoefficients.costs`: retain loss units per loss unit of the protected
            group. Positive: the request pushes against the group. NaN is left blank.
        protected: The names of the rows.
        requests: The names of the columns.
        title: The title.

    Returns:
        A figure; `figure.savefig("costs.png")` writes it.

    Raises:
        HAMUValueError: If the array is empty or of another shape.
        MissingMatplotlibError: If matplotlib is not installed.

    Example:
        >>> figure = plot_costs([[0.3, 0.0]], ["digit 8"], ["digit 3", "at random"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['0.3', '0']
    """
    array = as_array("costs", costs, 2)
    check_shapes((len(protected), len(requests)), costs=array)
    figure = make_figure(2.6 + 1.1 * len(requests), 1.8 + 0.55 * len(protected))
    axes = figure.add_subplot()
    most = float(np.nanmax(np.abs(array), initial=0.0)) or 1.0
    image = axes.imshow(array, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xticks(range(len(requests)), requests, rotation=20, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(protected)), protected)
    axes.set_xlabel("request")
    axes.set_ylabel("protected group")
    axes.spines[:].set_visible(False)
    for (row, column), cost in np.ndenumerate(array):
        if np.isfinite(cost):
            color = "white" if abs(cost) > 0.6 * most else "black"
            axes.text(column, row, f"{cost:.2g}", ha="center", va="center", color=color)
    figure.colorbar(image, label="retain loss per loss\nof the protected group", pad=0.02)
    return figure
