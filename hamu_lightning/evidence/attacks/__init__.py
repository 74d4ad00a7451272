"""Attacks after the fact: what can still be got out of a model that was made to forget."""

from hamu_lightning.evidence.attacks._attack import ATTACKS, attack
from hamu_lightning.evidence.attacks._rounding import round_weights

__all__ = ["ATTACKS", "attack", "round_weights"]
