"""`spectralkv plot`: pictures of result JSON, and of profiles; what a result lacks the fields for is named."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..codecs.registry import check_bits
from ..errors import UsageError
from ..planning.methods import DEFAULT_METHOD, get_method
from ..plotting import draw as plots
from ..plotting.results import read_results
from .options import check_output, values_of

NAME, HELP = "plot", "draw pictures of the JSON of eval and bench, and of profiles"
PARENTS = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command alone."""
    add = parser.add_argument
    add("results", nargs="+", metavar="RESULTS", help="result JSON, profile, or a folder of result JSON")
    add("--output", default="figures", metavar="DIR", help="where to draw (default %(default)s)")
    add("--format", metavar="A,B", help=f"{', '.join(plots.FORMATS)} (default png)")
    add("--only", metavar="A,B", help=f"of {', '.join(plots.PICTURES)} (default: all that can be drawn)")
    add("--bits", type=float, help="budget of the plan that a profile's bits are shown for (default 3)")


def run(args: argparse.Namespace) -> dict:
    """Draw, and name what could not be drawn."""
    formats = values_of(args.format, "--format", str) or ("png",)
    if Path(args.output).is_file():
        raise UsageError(f"Expected a folder for --output, received the file {args.output}.")
    check_bits(get_method(DEFAULT_METHOD), args.bits)
    check_output(str(Path(args.output) / "picture"))
    results = read_results(args.results, args.bits)
    result = plots.draw(results, args.output, formats, values_of(args.only, "--only", str))
    for skipped in result["skipped"]:
        print(
            f"spectralkv: no picture {skipped['picture']} of {skipped['result']}: {skipped['reason']}", file=sys.stderr
        )
    if not args.json:
        print("\n".join(result["pictures"]))
    return result
