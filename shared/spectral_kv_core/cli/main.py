"""The command `spectralkv`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from .. import __version__
from ..errors import UsageError
from .output import LONGEST_LINE, drop_stdout, in_options, prepare_stdout, print_all, print_json, printable

if TYPE_CHECKING:
    from .host_commands import HostCommands

WRONG_USE = (UsageError, FileNotFoundError)  # any other error is a fault


class OneLineParser(argparse.ArgumentParser):
    """A parser, and the subparsers made by it, that says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the line and end with 2."""
        line = printable(message, LONGEST_LINE).removesuffix(".")
        self.exit(2, f"spectralkv: {line}. Try: {self.prog} --help\n")


def command_modules() -> tuple[ModuleType | HostCommands, ...]:
    """The commands: each has NAME, HELP, PARENTS (parsers of shared options), add_arguments(parser) and run(args).

    They are imported here, where `main` waits for Ctrl-C: what they need takes a while to load.
    """
    from . import bench, cache_prompt, chat, evaluate, fit, generate, inspect, methods, plot, profile, report, serve
    from .host_commands import host_commands

    own = profile, generate, chat, serve, cache_prompt, evaluate, bench, inspect, methods, fit, plot, report
    return *own, *host_commands()


def build_parser() -> argparse.ArgumentParser:
    """Parser of all commands; wrong use exits with 2 and one line."""
    commands = command_modules()
    from .options import common_options

    parser = OneLineParser(
        prog="spectralkv", description="KV-cache compression: real bytes, honest quality.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"spectralkv {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in commands:
        parents = [options() for options in (*command.PARENTS, common_options)]
        sub = subparsers.add_parser(
            command.NAME, help=command.HELP, description=command.HELP, parents=parents, allow_abbrev=False
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command: 0 done, 2 wrong use, 1 anything else; errors are one line on stderr, Ctrl-C is 130."""
    args = None
    try:
        args = build_parser().parse_args(arguments)
        prepare_stdout(args.json)
        _quiet_hosts()
        result = args.run(args)
        if args.json:
            print_json(result)
        print_all()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        drop_stdout()
        if args is not None and args.debug:
            raise
        return _report(error, args)
    return 0


def _quiet_hosts() -> None:
    """The hosts' own chatter would drown the one line that matters."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("spectralkv: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), LONGEST_LINE)


def _report(error: Exception, args: argparse.Namespace | None) -> int:
    """Print the one line of `error`; returns the exit code."""
    text = printable(in_options(str(error), args), LONGEST_LINE) or type(error).__name__
    if isinstance(error, BrokenPipeError):
        text = "Expected standard output to take all that is printed, its reader has gone."
    if sys.stderr is not None:
        print(f"spectralkv: {text}", file=sys.stderr)
    return 2 if isinstance(error, WRONG_USE) else 1
