"""The command `spectralkv`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys

from .. import __version__
from . import bench, cache_prompt, evaluate, fit, generate, inspect, methods, plot, profile
from .options import common_options
from .output import in_options, printable, to_plain

LONGEST_LINE = 2000  # characters of an error
# each has NAME, HELP, PARENTS (parsers of shared options), add_arguments(parser) and run(args)
COMMANDS = (profile, generate, cache_prompt, evaluate, bench, inspect, methods, fit, plot)


def build_parser() -> argparse.ArgumentParser:
    """Parser of all commands; wrong use exits with 2 and one line."""
    parser = argparse.ArgumentParser(prog="spectralkv", description="KV-cache compression: real bytes, honest quality.")
    parser.add_argument("--version", action="version", version=f"spectralkv {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        parents = [options() for options in (*command.PARENTS, common_options)]
        sub = subparsers.add_parser(command.NAME, help=command.HELP, description=command.HELP, parents=parents)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command: 0 done, 2 wrong use, 1 anything else; errors are one line on stderr."""
    args = build_parser().parse_args(arguments)
    # the hosts' own chatter would drown the one line that matters
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="spectralkv: %(message)s")
    try:
        result = args.run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if args.debug:
            raise
        text = printable(in_options(str(error), args), LONGEST_LINE) or type(error).__name__
        print(f"spectralkv: {text}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1
    if args.json:
        print(json.dumps(result, default=to_plain))
    return 0
