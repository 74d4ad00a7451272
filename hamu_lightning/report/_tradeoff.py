"""The picture of what forgetting cost."""

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
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELS = (
    "retain improvement: fall of the retain loss (loss units)",
    "forget improvement: rise of the forget loss (loss units)",
)


def plot_tradeoff(
    retain_improvement: Numbers,
    forget_improvement: Numbers,
    steps: Numbers,
    *,
    reference: tuple[float, float] | None = None,
    reference_label: str = "retrained",
    title: str = "What forgetting costs",
) -> Figure:
    """Draw the path of unlearning in the plane of the two objectives.

    To the right the retain loss has fallen, upwards the forget loss has risen, both against the original model, which
    is the origin. A path that goes straight up forgets at no cost.

    Args:
        retain_improvement: `[S]`, original retain loss minus the retain loss, loss units.
        forget_improvement: `[S]`, forget loss minus the original forget loss, loss units.
        steps: `[S]`, the step of each point, for the colour.
        reference: The two improvements of a model to compare with, such as one retrained without the forget set.
        reference_label: The name of that model.
        title: The title.

    Returns:
        A figure; `figure.savefig("tradeoff.png")` writes it.

    Raises:
        HAMUValueError: If an array is empty or of another shape.
        MissingMatplotlibError: If matplotlib is not installed.

    Example:
        >>> figure = plot_tradeoff([0.0, 0.1], [0.0, 2.0], [0, 10], reference=(0.1, 2.5))
        >>> figure.axes[0].get_xlabel()
        'retain improvement: fall of the retain loss (loss units)'
    """
    x, y = as_array("retain_improvement", retain_improvement, 1), as_array("forget_improvement", forget_improvement, 1)
    step = as_array("steps", steps, 1)
    check_shapes(x.shape, forget_improvement=y, steps=step)
    figure = make_figure(6.4, 4.8)
    axes = figure.add_subplot()
    axes.locator_params(axis="x", nbins=6)
    draw_plane(axes, title)
    axes.plot(x, y, color="0.75", linewidth=1.2, zorder=2)
    points = axes.scatter(x, y, c=step, cmap="viridis", s=26, zorder=3)
    figure.colorbar(points, label="step", pad=0.02)
    mark(axes, 0.0, 0.0, "s", BLACK, "original")
    mark(axes, float(x[-1]), float(y[-1]), "D", BLUE, "unlearned")
    if reference is not None:
        mark(axes, *reference, "*", ORANGE, reference_label)
    axes.legend(frameon=False, loc="best")
    return figure


def draw_plane(axes: Axes, title: str) -> None:
    """Label the plane of the two objectives, and draw its axes through the original model."""
    style_axes(axes, title, *_LABELS)
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    axes.axvline(0, color=GREY, linewidth=0.8, zorder=1)


def mark(axes: Axes, x: float, y: float, marker: str, color: str, label: str) -> None:
    """Draw one model."""
    size = 220 if marker == "*" else 70
    axes.scatter([x], [y], marker=marker, s=size, color=color, edgecolors="white", linewidths=1, label=label, zorder=4)
