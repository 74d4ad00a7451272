"""The command `hamu-lightning`: reports and checks from files, without a line of Python.

A new command is a function in a file of its own, and a line in `COMMANDS`.
"""

from hamu_lightning.commands._main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
