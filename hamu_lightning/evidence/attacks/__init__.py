"""Attacks after the fact: what can still be got out of a model that was made to forget."""

from hamu_lightning.evidence.attacks._attack import ATTACKS, attack, is_telling
from hamu_lightning.evidence.attacks._rounding import round_weights

__all__ = ["ATTACKS", "attack", "is_telling", "round_weights"]
