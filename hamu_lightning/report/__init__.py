"""What happened during unlearning: a recorder of its steps, and pictures.

The pictures need matplotlib (`pip install matplotlib`); it is loaded when the first one is drawn.
"""

from hamu_lightning.report._comparison import plot_comparison
from hamu_lightning.report._costs import plot_costs
from hamu_lightning.report._figures import MissingMatplotlibError
from hamu_lightning.report._hardness import plot_hardness
from hamu_lightning.report._losses import plot_losses, plot_ranks, render
from hamu_lightning.report._promises import plot_promises
from hamu_lightning.report._recorder import StepHistory, StepRecorder
from hamu_lightning.report._tradeoff import plot_tradeoff

__all__ = [
    "MissingMatplotlibError",
    "StepHistory",
    "StepRecorder",
    "plot_comparison",
    "plot_costs",
    "plot_hardness",
    "plot_losses",
    "plot_promises",
    "plot_ranks",
    "plot_tradeoff",
    "render",
]
