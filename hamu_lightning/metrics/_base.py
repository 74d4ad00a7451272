"""What all metrics share: the options and pictures of torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchmetrics import Metric
from typing_extensions import override

from hamu_lightning.checks import describe
from hamu_lightning.errors import HAMUValueError


class HAMUMetric(Metric):
    """A torchmetrics metric with all of torchmetrics' options, whose result may have several numbers.

    Args:
        **options: torchmetrics' own: `sync_on_compute`, `dist_sync_on_step`, `process_group`, `compute_on_cpu`, ...

    Raises:
        HAMUValueError: If an option is unknown or of the wrong kind.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValueError as error:
            given = ", ".join(f"{name}={describe(value)}" for name, value in options.items())
            raise HAMUValueError(
                f"Expected options of torchmetrics.Metric, but one is none of them: {given}."
            ) from error

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw one value or several, with matplotlib.

        Args:
            val: What `compute` or `forward` returned, or a list of such values. Default: what `compute` returns now.
            ax: The axes to draw into. Default: new ones.

        Returns:
            A matplotlib figure, and its axes.
        """
        val = self.compute() if val is None else val
        return self._plot(_by_name(val) if hasattr(val, "_asdict") else _each_by_name(val), ax)


def _by_name(value: Any) -> Any:
    """A result of several numbers as torchmetrics draws it."""
    return value._asdict() if hasattr(value, "_asdict") else value


def _each_by_name(values: Any) -> Any:
    return [_by_name(value) for value in values] if isinstance(values, Sequence) else values
