"""`spectralkv BACKEND COMMAND`: a command of the library behind a backend, with compressed caches.

A backend that has such commands has a module `commands`, with COMMANDS, their names, and run(name, arguments).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ..errors import UsageError
from ..hosts.backends import backends_with, load_backend


@dataclass(frozen=True)
class HostCommands:
    """The command of the backend called NAME: what `main` asks of a module of a command."""

    NAME: str
    PARENTS: tuple = ()

    @property
    def HELP(self) -> str:
        return f"run a command of the library behind {self.NAME}, with its own options and compressed caches"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The name of the host's command, and all that belongs to it."""
        parser.add_argument(
            "host_command", nargs="?", metavar="COMMAND", help="its name; its options follow, see: COMMAND --help"
        )
        told = "its own options, and those of a compressed cache"
        parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="OPTIONS", help=told).required = False

    def run(self, args: argparse.Namespace) -> dict:
        """Run it; it prints what it prints."""
        if args.json:
            raise UsageError(f"Expected no --json with {self.NAME}, whose commands print text of their own.")
        _, commands = load_backend(self.NAME, "commands")
        if args.host_command not in commands.COMMANDS:
            received = "none" if args.host_command is None else repr(args.host_command)
            raise UsageError(
                f"Expected a command among {', '.join(commands.COMMANDS)}, received {received}. Try: spectralkv {self.NAME} "
                f"{commands.COMMANDS[0]} --help"
            )
        commands.run(args.host_command, args.arguments)
        return {}


def host_commands() -> tuple[HostCommands, ...]:
    """Those of all registered backends."""
    return tuple(HostCommands(name) for name in backends_with("commands"))
