"""Finds the command, and turns errors into one line."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from hamu_lightning.commands._evaluate import evaluate
from hamu_lightning.commands._preflight import preflight
from hamu_lightning.commands._report import report
from hamu_lightning.commands._scrub import scrub
from hamu_lightning.commands._unlearn import unlearn
from hamu_lightning.commands._verify import verify
from hamu_lightning.errors import HAMUError, HAMUStateError

COMMANDS: Mapping[str, Callable[..., int]] = {
    "unlearn": unlearn,
    "preflight": preflight,
    "evaluate": evaluate,
    "report": report,
    "verify": verify,
    "scrub": scrub,
}
"""For the name of each command its function: arguments without a default are positional, the others are options; the
docstring is the help, and its last paragraph before `Args` may be an example; what is False by default is a flag. One
that takes a `project` has options alone, beside those of LightningCLI. It returns the exit code."""

_WRONG = 2


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: The words of the command line. Default: those of this process.

    Returns:
        The exit code: 0 where all is well, 1 where something differs, 2 where nothing could be said.
    """
    words = _underscored(sys.argv[1:] if args is None else args)
    try:
        parser = _make_parser()
        if words[:1] and _takes_project(words[0]) and not {"-h", "--help"} & {*words}:
            from hamu_lightning.commands._project import run_in_project  # needs jsonargparse

            return run_in_project(COMMANDS[words[0]], words[1:])
        chosen = parser.parse_args(words)
        command = COMMANDS[chosen.command]
        given = vars(chosen[chosen.command])
        return command(**{name: given[name] for name in inspect.signature(command).parameters})
    except HAMUError as error:
        print(f"hamu-lightning: {error}", file=sys.stderr)
        return _WRONG


def _make_parser() -> Any:
    try:
        jsonargparse = import_module("jsonargparse")
    except ImportError as error:
        raise HAMUStateError(
            "Expected jsonargparse for the command line, but it is not installed. Run: pip install hamu_lightning[cli]"
        ) from error
    parser = jsonargparse.ArgumentParser(
        prog="hamu-lightning", description="Makes trained models forget, reports on it, and checks reports."
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, command in COMMANDS.items():
        about = import_module("docstring_parser").parse(command.__doc__ or "")
        text, _, example = f"{about.long_description or ''}".partition("Example: ")
        made = jsonargparse.ArgumentParser(
            description=f"{about.short_description} {' '.join(text.split())}",
            epilog=example and f"Example: {' '.join(example.split())}",
        )
        flags = {x.arg_name: x.description for x in about.params if isinstance(_default(command, x.arg_name), bool)}
        made.add_function_arguments(command, as_positional=not _takes_project(name), skip={*flags, "project"})
        for flag, words in flags.items():
            made.add_argument(f"--{flag}", action="store_true", help=words)
        commands.add_subcommand(name, made, help=about.short_description)
    return parser


def _takes_project(name: str) -> bool:
    return name in COMMANDS and "project" in inspect.signature(COMMANDS[name]).parameters


def _underscored(words: Sequence[str]) -> list[str]:
    """The names of options as Python writes them: people write them with hyphens, too."""
    parts = [word.partition("=") for word in words]
    return [
        "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else name + equals + value
        for name, equals, value in parts
    ]


def _default(command: Callable[..., int], argument: str) -> Any:
    return inspect.signature(command).parameters[argument].default
