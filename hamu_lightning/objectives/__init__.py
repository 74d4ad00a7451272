"""Objectives: what is raised on the forget stream and lowered on the retain stream."""

from hamu_lightning.objectives._adapters import AdaptersDisabled, SecondAdapter
from hamu_lightning.objectives._base import BatchPass, LossCap, ModuleLoss, Objective, WeightedSum
from hamu_lightning.objectives._cached_logits import CachedLogits
from hamu_lightning.objectives._calibration import Calibration
from hamu_lightning.objectives._divergence import DELETE, UNDIAL, BadTeacher, ReferenceKL
from hamu_lightning.objectives._labels import CrossEntropy, RandomLabels, UniformLabels
from hamu_lightning.objectives._odds import ClassReader, log_odds
from hamu_lightning.objectives._outputs import CoreTokens, ModuleOutputs, Outputs
from hamu_lightning.objectives._preference import DPO, NPO, AltPO, IdkDPO, SimNPO
from hamu_lightning.objectives._reference import FrozenCopy, Reference, evaluating
from hamu_lightning.objectives._representation import RMU, RMURetain
from hamu_lightning.objectives._tokens import CEU, WGA, EntropyWeighted, SatImp, TokenCap, TokenMean, TokenObjective
from hamu_lightning.objectives._unseen import AnswerObjective, SecondAnswer, UnseenAnswer

__all__ = [
    "CoreTokens",
    "TokenObjective",
    "TokenMean",
    "TokenCap",
    "SatImp",
    "EntropyWeighted",
    "WGA",
    "CEU",
    "AltPO",
    "DELETE",
    "DPO",
    "NPO",
    "RMU",
    "UNDIAL",
    "AdaptersDisabled",
    "AnswerObjective",
    "BadTeacher",
    "BatchPass",
    "CachedLogits",
    "Calibration",
    "ClassReader",
    "CrossEntropy",
    "FrozenCopy",
    "IdkDPO",
    "LossCap",
    "ModuleLoss",
    "ModuleOutputs",
    "Objective",
    "Outputs",
    "RMURetain",
    "RandomLabels",
    "Reference",
    "ReferenceKL",
    "SecondAdapter",
    "SecondAnswer",
    "SimNPO",
    "UniformLabels",
    "UnseenAnswer",
    "WeightedSum",
    "evaluating",
    "log_odds",
]
