"""The picture of several methods side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.report._figures import BLACK, ORANGE, Numbers, as_array, make_figure
from hamu_lightning.report._tradeoff import draw_plane, mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's without black, which is the original's, and yellow, which is too light for lines.
_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5539")
# From here on, in units of the median end or of the reference, an axis is not linear.
_FAR = 10.0
_MARKERS = ("o", "v", "D", "^", "p")


def plot_comparison(
    paths: Mapping[str, Numbers],
    *,
    reference: tuple[float, float] | None = None,
    reference_label: str = "retrained",
    title: str = "What forgetting costs, by method",
) -> Figure:
    """Draw the path of each method in the plane of the two objectives.

    To the right the retain loss has fallen, upwards the forget loss has risen, both against the original model, which
    is the origin. The marker is where a method ends. Where one method goes much further than most end, its axis is
    linear around 0 and logarithmic beyond: a destroyed model would press all others together.

    Args:
        paths: For each method `[S, 2]`: retain improvement (original retain loss minus retain loss) and forget
            improvement (forget loss minus original forget loss) of `S` points, loss units. Points that are not finite
            are left out.
        reference: The two improvements of a model to compare with, such as one retrained without the forget set.
        reference_label: The name of that model.
        title: The title.

    Returns:
        A figure; `figure.savefig("comparison.png")` writes it.

    Raises:
        HAMUValueError: If there is no method, or a path has another shape.
        MissingMatplotlibError: If matplotlib is not installed.

    Example:
        >>> figure = plot_comparison({"SSD": [[0.0, 0.0], [-0.1, 2.0]]}, reference=(0.0, 2.5))
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['original', 'retrained', 'SSD']
    """
    if not paths:
        raise HAMUValueError("Expected at least one path, but `paths` is empty.")
    points = {name: as_array(name, path, 2) for name, path in paths.items()}
    for name, array in points.items():
        if array.shape[1] != 2:
            raise HAMUValueError(f"Expected the path of `{name}` to be of shape [S, 2], but got {list(array.shape)}.")
    figure = make_figure(8.4, 4.8 + 0.18 * max(0, len(points) - 20))
    axes = figure.add_subplot()
    draw_plane(axes, title)
    ends = np.stack([array[-1] for array in points.values()])
    _scale(axes, np.concatenate(list(points.values())), ends, np.abs(reference or (0.0, 0.0)))
    mark(axes, 0.0, 0.0, "s", BLACK, "original")
    if reference is not None:
        mark(axes, *reference, "*", ORANGE, reference_label)
    for number, (name, array) in enumerate(points.items()):
        _draw_path(axes, number, name, array[np.isfinite(array).all(axis=1)])
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def _scale(axes: Axes, points: Any, ends: Any, reference: Any) -> None:
    """Choose linear or mixed axes from all points and the ends, `[., 2]` each, and the reference, `[2]`."""
    for column, set_scale, axis in ((0, axes.set_xscale, axes.xaxis), (1, axes.set_yscale, axes.yaxis)):
        sizes, usual = (np.abs(array[np.isfinite(array[:, column]), column]) for array in (points, ends))
        scale = max(np.median(usual), reference[column]) if usual.size else 0.0
        if scale > 0 and sizes.max() > _FAR * scale:
            set_scale("symlog", linthresh=10 ** np.ceil(np.log10(scale)), linscale=2)
            axis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_path(axes: Axes, number: int, name: str, points: Any) -> None:
    """A line and its end; colour and marker together differ for 30 methods."""
    colour = _COLOURS[number % len(_COLOURS)]
    marker = _MARKERS[number // len(_COLOURS) % len(_MARKERS)]
    axes.plot(*points.T, color=colour, linewidth=1.2, alpha=0.7, zorder=2)
    axes.plot(*points[-1:].T, marker, color=colour, markersize=7, markeredgecolor="white", label=name, zorder=3)
