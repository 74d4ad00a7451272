"""A project on the command line: its module, data and Trainer as LightningCLI reads them, and our callback."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from hamu_lightning.callbacks import HAMUCallback, Unseen
from hamu_lightning.data import UnlearnData
from hamu_lightning.errors import HAMUValueError

_AIMS = ("rule", "target", "schedule")


class Project(LightningCLI):
    """What a command works with.

    Args:
        command: The command; its arguments are options beside those of LightningCLI.
        words: The words after the name of the command.

    Attributes:
        given: The arguments of the command.
    """

    def __init__(self, command: Callable[..., int], words: Sequence[str]) -> None:
        self._command = command
        with _in_folder_of_the_project():
            super().__init__(
                save_config_callback=None,
                args=[*words],
                run=False,
                parser_kwargs={"prog": f"hamu-lightning {command.__name__}", "exit_on_error": False},
            )
        names = [action.dest for action in self.parser._actions]
        self.given = {name: self.config[name] for name in _options(command) if name in names}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_function_arguments(self._command, skip={"project"})
        parser.add_class_arguments(HAMUCallback, "hamu", skip={"forget", "protect", "deprecated"}, instantiate=False)

    @property
    def module(self) -> LightningModule:
        """The module of `--model`."""
        return self.model  # type: ignore[no-any-return]

    def load_data(self, forget_ids: str | None, by: str | None, missing: Literal["raise", "warn"]) -> Any:
        """Return the data of `--data`, parted by ids where there are any.

        Raises:
            HAMUValueError: If there is no DataModule to part.
        """
        if forget_ids is None:
            return self.datamodule
        if self.datamodule is None:
            raise HAMUValueError("Expected a DataModule whose samples the ids name, but got none. Give --data.")
        return UnlearnData(self.datamodule, forget=forget_ids, by=_as_number(by), missing=missing)

    def find_callback(self, **settings: Any) -> HAMUCallback:
        """Return the HAMUCallback: that of the Trainer's configuration, or one of `--hamu`, by default to `Unseen()`.

        Raises:
            HAMUValueError: If there are both.
        """
        trainer: Any = self.trainer
        found = [callback for callback in trainer.callbacks if isinstance(callback, HAMUCallback)]
        given = {name: value for name, value in vars(self.config_init.hamu).items() if value is not None}
        has_aim = any(name in given for name in _AIMS)
        if found and has_aim:
            raise HAMUValueError(
                "Expected one HAMUCallback, but got one of the Trainer and one of --hamu. Leave one out."
            )
        if found:
            return found[0]
        arguments: dict[str, Any] = {**({} if has_aim else {"target": Unseen()}), **given, **settings}
        callback = HAMUCallback(**arguments)
        trainer.callbacks.insert(0, callback)
        return callback

    def introduce(self, data: Any) -> None:
        """Let module and data know the Trainer, as in a fit. `data.parts()` has them prepare themselves."""
        trainer: Any = self.trainer
        self.module.trainer, trainer.datamodule, data.trainer = trainer, data, trainer


def run_in_project(command: Callable[..., int], words: Sequence[str]) -> int:
    """Run a command on a project.

    Raises:
        HAMUValueError: If the words cannot be read.
    """
    try:
        project = Project(command, words)
    except ArgumentError as error:
        raise HAMUValueError(f"{_explain(str(error))} See hamu-lightning {command.__name__} --help.") from error
    return command(project, **project.given)


def _explain(fault: str) -> str:
    if "UnlearnData'" in fault and "required: datamodule" in fault:
        return (
            "Expected `data` to be a DataModule, but got UnlearnData without one. Give your own as `data`, and the "
            "ids as --forget-ids ids.csv --by COLUMN."
        )
    return fault


def _options(command: Callable[..., int]) -> list[str]:
    return [name for name in command.__code__.co_varnames[: command.__code__.co_argcount] if name != "project"]


def _as_number(by: str | None) -> str | int | None:
    """A number means a tensor of a TensorDataset."""
    return int(by) if by is not None and by.lstrip("-").isdigit() else by


@contextmanager
def _in_folder_of_the_project() -> Iterator[None]:
    """Let classes of the working folder be found, as `python main.py` does, and Lightning see the given words alone."""
    words = sys.argv
    sys.argv = words[:1]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.argv = words
