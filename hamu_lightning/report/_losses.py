"""Pictures of single samples: the losses of forgotten and held-out ones, and the ranks of the ones among the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.report._figures import BLACK, BLUE, GREY, ORANGE, Numbers, as_array, make_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 24
# From so many decades on between the smallest and the largest loss the axis is logarithmic; what is smaller than this
# share of the largest loss stands in the first bin.
_DECADES, _SMALLEST = 1.5, 1e-6


def plot_losses(
    before: tuple[Numbers, Numbers],
    after: tuple[Numbers, Numbers],
    *,
    auc: tuple[float, float] | None = None,
    unit: str = "loss",
    title: str = "",
) -> Figure:
    """Draw how the losses of forgotten and of held-out samples are spread, before and after unlearning.

    Where the two heaps lie one over the other an attack by loss finds nothing, and its AUC is near 0.5.

    Args:
        before: The losses before unlearning: of forgotten samples `[N]`, and of held-out ones `[M]`.
        after: The same after it.
        auc: The AUC of the attack by loss before and after, for the titles.
        unit: What is on the axis.
        title: The title of the whole picture; none by default.

    Returns:
        A figure; `figure.savefig("losses.png")` writes it.

    Raises:
        HAMUValueError: If an array is empty, of another shape, or has no finite number.
        MissingMatplotlibError: If matplotlib is not installed.

    Example:
        >>> figure = plot_losses(([0.1, 0.2], [0.5, 1.0]), ([0.6, 0.9], [0.5, 1.0]), auc=(1.0, 0.5))
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['before: AUC 1', 'after: AUC 0.5']
    """
    pairs = [tuple(_finite(name, losses) for losses in pair) for name, pair in (("before", before), ("after", after))]
    edges, is_log = _choose_edges(np.concatenate([losses for pair in pairs for losses in pair]))
    figure = make_figure(8.0, 3.4)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for number, (axes, name, pair) in enumerate(zip(panels, ("before", "after"), pairs, strict=True)):
        heading = name if auc is None or np.isnan(auc[number]) else f"{name}: AUC {auc[number]:.3g}"
        style_axes(axes, heading, unit, "" if number else "share of the samples")
        for losses, colour, label in zip(pair, (ORANGE, BLUE), ("forgotten", "held-out"), strict=True):
            _draw_heap(axes, losses, edges, colour, label)
    if is_log:
        panels[0].set_xscale("log")
    _explain(figure, panels[0])
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def plot_ranks(
    ranks: Numbers,
    *,
    before: Numbers | None = None,
    held_out: int | None = None,
    title: str = "Ranks of forgotten samples",
) -> Figure:
    """Draw where forgotten samples lie among held-out ones, by loss: spread evenly where they are like unseen ones.

    A heap at 0 is of samples that are still remembered, one at 1 of samples that were forgotten too much: both tell
    them from unseen ones. The grey band is where 95 % of the bars of as many samples lie that are spread evenly.

    Args:
        ranks: `[N]`, for each forgotten sample the share of held-out ones with a lower loss, in [0, 1].
        before: `[N]`, the same before unlearning, drawn as a line.
        held_out: How many held-out samples there are, for the width of the band; None for many.
        title: The title.

    Returns:
        A figure; `figure.savefig("ranks.png")` writes it.

    Raises:
        HAMUValueError: If an array is empty, of another shape, or has no finite number.
        MissingMatplotlibError: If matplotlib is not installed.

    Example:
        >>> figure = plot_ranks([0.1, 0.5, 0.9], before=[0.0, 0.0, 0.1])
        >>> figure.axes[0].get_xlabel()
        'share of held-out samples with a lower loss'
    """
    after = _finite("ranks", ranks)
    bins = int(np.clip(len(after) // 10, 5, 20))
    figure = make_figure(6.0, 3.4)
    axes = figure.add_subplot()
    style_axes(axes, title, "share of held-out samples with a lower loss", "share of the samples")
    # The held-out samples are a sample too: their own scatter widens the band.
    half = 1.96 * np.sqrt((1 - 1 / bins) / bins * (1 / len(after) + (1 / held_out if held_out else 0)))
    axes.axhspan(max(0.0, 1 / bins - half), 1 / bins + half, color=GREY, alpha=0.25, linewidth=0, zorder=0)
    axes.axhline(1 / bins, color=BLACK, linestyle=":", linewidth=1.2, zorder=3, label="spread evenly")
    edges = np.linspace(0, 1, bins + 1)
    axes.stairs(_shares(after, edges), edges, fill=True, color=ORANGE, alpha=0.35)
    axes.stairs(_shares(after, edges), edges, color=ORANGE, linewidth=1.6, label="after")
    if before is not None:
        axes.stairs(_shares(_finite("before", before), edges), edges, color=BLACK, linewidth=1.6, label="before")
    axes.set_xlim(0, 1)
    _explain(figure, axes)
    return figure


def _explain(figure: Figure, axes: Axes) -> None:
    """Put the legend above the panels, where it hides nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", frameon=False, fontsize=10, ncols=3)


def render(figure: Figure) -> NDArray[np.uint8]:
    """Return a figure as an image, `[height, width, 3]`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    image: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()
    return image


def _finite(name: str, losses: Numbers) -> NDArray[np.float64]:
    """The finite ones of `[N]` numbers."""
    array = as_array(name, losses, 1)
    found = array[np.isfinite(array)]
    if not found.size:
        raise HAMUValueError(f"Expected `{name}` to have a finite number, but it has none. Leave the picture out.")
    return found


def _choose_edges(losses: NDArray[np.float64]) -> tuple[NDArray[np.float64], bool]:
    """The borders of the bins, and whether their axis is logarithmic."""
    least, most = losses.min(), losses.max()
    floor = max(least, _SMALLEST * most)
    if least >= 0 and floor > 0 and np.log10(most / floor) > _DECADES:
        return np.geomspace(floor, most * (1 + 1e-9), _BINS + 1), True
    return np.linspace(least, most if most > least else least + 1, _BINS + 1), False


def _draw_heap(axes: Axes, losses: NDArray[np.float64], edges: NDArray[np.float64], colour: str, label: str) -> None:
    shares = _shares(losses.clip(edges[0], edges[-1]), edges)
    axes.stairs(shares, edges, fill=True, color=colour, alpha=0.35)
    axes.stairs(shares, edges, color=colour, linewidth=1.6, label=f"{label} ({len(losses)})")


def _shares(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.histogram(values, edges)[0] / len(values)
