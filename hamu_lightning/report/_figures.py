"""What all pictures share. The only place that imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hamu_lightning.errors import HAMUError, HAMUValueError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers: TypeAlias = Tensor | NDArray[Any] | Sequence[float] | Sequence[Sequence[float]]

# Okabe and Ito's colours, which people with any colour vision can tell apart.
BLACK, BLUE, ORANGE, GREEN, GREY = "#000000", "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
DPI = 150


class MissingMatplotlibError(HAMUError, ImportError):
    """A picture was asked for, but matplotlib is not installed."""


def make_figure(width: float, height: float) -> Figure:
    """Make an empty figure, inches. It belongs to no window: `figure.savefig(path)` writes it."""
    try:
        module = import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingMatplotlibError(
            "Expected matplotlib for pictures, but it is not installed. Run: pip install matplotlib"
        ) from error
    figure: Figure = module.Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure


def style_axes(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Set the texts, and leave out what carries no information."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def as_array(name: str, values: Numbers, ndim: int) -> NDArray[np.float64]:
    """Return the values as a float64 array, or raise if it has another number of dimensions or is empty."""
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)
    if array.ndim != ndim or array.size == 0:
        raise HAMUValueError(
            f"Expected `{name}` to have {ndim} dimension{'s' * (ndim > 1)} and at least one entry, "
            f"but got shape {list(array.shape)}."
        )
    return array


def check_shapes(shape: tuple[int, ...], **arrays: NDArray[np.float64]) -> None:
    """Raise unless all arrays have the shape."""
    for name, array in arrays.items():
        if array.shape != shape:
            raise HAMUValueError(f"Expected `{name}` to have shape {list(shape)}, but got {list(array.shape)}.")
