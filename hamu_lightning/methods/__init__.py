"""Unlearning methods that are called, not stepped: the standards of comparison, and one call for all others."""

from hamu_lightning.methods._fisher import SampleLosses, classifier_losses, empirical_fisher, expected_fisher
from hamu_lightning.methods._fisher_forgetting import FisherForgetting
from hamu_lightning.methods._protocol import DataSource, Method
from hamu_lightning.methods._retrain import Retrain
from hamu_lightning.methods._ssd import SSD
from hamu_lightning.methods._training_run import TrainingRun

__all__ = [
    "SSD",
    "DataSource",
    "FisherForgetting",
    "Method",
    "Retrain",
    "SampleLosses",
    "TrainingRun",
    "classifier_losses",
    "empirical_fisher",
    "expected_fisher",
]
