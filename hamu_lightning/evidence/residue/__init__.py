"""The residue: where forgotten data may still sit, and taking out what is ours."""

from hamu_lightning.evidence.residue._audit import audit
from hamu_lightning.evidence.residue._scrub import Scrubbed, scrub

__all__ = ["Scrubbed", "audit", "scrub"]
