"""The picture of what verified steps promised and did."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    from matplotlib.figure import Figure


def plot_promises(
    promised: Numbers,
    measured: Numbers,
    steps: Numbers,
    kept: Numbers | None = None,
    *,
    title: str = "Promised and measured rise of the forget loss",
) -> Figure:
    """Draw for each step the rise of the forget loss that it promised, and the one that was measured.

    Args:
        promised: `[S]`, loss units.
        measured: `[S]`, loss units, on the same batch after the step.
        steps: `[S]`, the number of each step; a step that was tried again stands there more than once.
        kept: `[S]`, 1 where the step was kept, 0 where it was taken back. Default: all were kept.
        title: The title.

    Returns:
        A figure; `figure.savefig("promises.png")` writes it.

    Raises:
        HAMUValueError: If an array is empty or of another shape.
        MissingMatplotlibError: If matplotlib is not installed.

    Example:
        >>> figure = plot_promises([0.1, 0.2], [0.11, 0.02], [1, 2], [1, 0])
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['promised', 'measured', 'measured, and taken back']
    """
    due, came = as_array("promised", promised, 1), as_array("measured", measured, 1)
    step = as_array("steps", steps, 1)
    flags = as_array("kept", [1.0] * len(step) if kept is None else kept, 1)
    check_shapes(step.shape, promised=due, measured=came, kept=flags)
    is_kept = flags > 0
    figure = make_figure(6.4, 3.8)
    axes = figure.add_subplot()
    style_axes(axes, title, "step", "rise (loss units)")
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    axes.plot(step[is_kept], due[is_kept], color=BLACK, linewidth=1.4, label="promised")
    axes.scatter(step[is_kept], came[is_kept], s=18, color=BLUE, label="measured", zorder=3)
    if not is_kept.all():
        label = "measured, and taken back"
        axes.scatter(step[~is_kept], came[~is_kept], s=30, marker="x", color=ORANGE, label=label, zorder=3)
    axes.legend(frameon=False)
    return figure
