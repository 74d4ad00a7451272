"""Evidence of what was forgotten: what models say of all parts of the data, attacks, the residue, and the report."""

from hamu_lightning.evidence._rows import AttackRow, Finding
from hamu_lightning.evidence._scores import Evaluation, PartScores

__all__ = ["AttackRow", "Evaluation", "Finding", "PartScores"]
