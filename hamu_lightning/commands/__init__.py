"""The command `hamu-lightning`: what can be done from files, without a line of Python."""

from hamu_lightning.commands._scrub import scrub

__all__ = ["scrub"]
