"""Unlearning methods that are called, not stepped: the standards of comparison, and one call for all others."""

from hamu_lightning.methods._compare import compare
from hamu_lightning.methods._comparison import Comparison
from hamu_lightning.methods._evaluation import Parts
from hamu_lightning.methods._fisher import SampleLosses, classifier_losses, empirical_fisher, expected_fisher
from hamu_lightning.methods._fisher_forgetting import FisherForgetting
from hamu_lightning.methods._problem import Run
from hamu_lightning.methods._protocol import DataSource, Method
from hamu_lightning.methods._relearn import Relearning, relearn, teach
from hamu_lightning.methods._retrain import Retrain
from hamu_lightning.methods._ssd import SSD
from hamu_lightning.methods._teacher import fit_teacher
from hamu_lightning.methods._training_run import TrainingRun
from hamu_lightning.methods._tuning import Search

__all__ = [
    "SSD",
    "Comparison",
    "DataSource",
    "FisherForgetting",
    "Method",
    "Parts",
    "Relearning",
    "Retrain",
    "Run",
    "SampleLosses",
    "Search",
    "TrainingRun",
    "classifier_losses",
    "compare",
    "empirical_fisher",
    "expected_fisher",
    "fit_teacher",
    "relearn",
    "teach",
]
