"""What is predicted: what a run can expect before any weight changes, and which weights the forget loss depends on."""

from hamu_lightning.callbacks.forecast._in_fit import FitPreflight
from hamu_lightning.callbacks.forecast._preflight import preflight
from hamu_lightning.callbacks.forecast._report import PreflightReport
from hamu_lightning.callbacks.forecast._saliency import compute_saliency_mask

__all__ = ["FitPreflight", "PreflightReport", "compute_saliency_mask", "preflight"]
