"""Evidence of what was forgotten: what models say of all parts of the data, attacks, the residue, and the report."""

from hamu_lightning.evidence._callback import EvaluateUnlearning
from hamu_lightning.evidence._evaluate import evaluate
from hamu_lightning.evidence._rows import AttackRow, Finding
from hamu_lightning.evidence._sample_table import MissingPyArrowError, SampleTable
from hamu_lightning.evidence._scores import Evaluation, PartScores
from hamu_lightning.evidence._trade_off import TradeOff, trade_off
from hamu_lightning.evidence.attacks import attack
from hamu_lightning.evidence.residue import audit, scrub

__all__ = [
    "AttackRow",
    "EvaluateUnlearning",
    "Evaluation",
    "Finding",
    "MissingPyArrowError",
    "PartScores",
    "SampleTable",
    "TradeOff",
    "attack",
    "audit",
    "evaluate",
    "scrub",
    "trade_off",
]
