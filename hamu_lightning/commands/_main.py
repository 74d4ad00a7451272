"""Finds the command, and turns errors into one line."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from hamu_lightning.commands._report import report
from hamu_lightning.commands._verify import verify
from hamu_lightning.errors import HAMUError

COMMANDS: Mapping[str, Callable[..., int]] = {"report": report, "verify": verify}
"""For the name of each command its function: arguments without a default are positional, the others are options; the
docstring is the help, and its last line may be an example. It returns the exit code."""

_WRONG = 2


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: The words of the command line. Default: those of this process.

    Returns:
        The exit code: 0 where all is well, 1 where something differs, 2 where nothing could be said.
    """
    try:
        parser, parsers = _make_parser()
        chosen = parser.parse_args(None if args is None else [*args])
        name = chosen.command
        values = {key: value for key, value in vars(chosen[name]).items() if key in _arguments(COMMANDS[name])}
        return COMMANDS[name](**values)
    except HAMUError as error:
        print(f"hamu-lightning: {error}", file=sys.stderr)
        return _WRONG


def _make_parser() -> tuple[Any, dict[str, Any]]:
    try:
        jsonargparse = import_module("jsonargparse")
    except ImportError as error:
        raise HAMUError(
            "Expected jsonargparse for the command line, but it is not installed. Run: pip install hamu_lightning[cli]"
        ) from error
    parser = jsonargparse.ArgumentParser(
        prog="hamu-lightning", description="Reports on unlearning, and checks of them."
    )
    commands = parser.add_subcommands(required=True, dest="command")
    made = {}
    for name, command in COMMANDS.items():
        text, _, example = inspect.cleandoc(command.__doc__ or "").partition("\n\nArgs:")[0].rpartition("\n\n")
        made[name] = jsonargparse.ArgumentParser(description=" ".join(text.split()), epilog=example)
        made[name].add_function_arguments(command, as_positional=True)
        commands.add_subcommand(name, made[name], help=text.splitlines()[0])
    return parser, made


def _arguments(command: Callable[..., int]) -> set[str]:
    return {*inspect.signature(command).parameters}
