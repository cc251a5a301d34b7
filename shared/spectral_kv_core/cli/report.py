"""`spectralkv report`: one page of results and profiles."""

from __future__ import annotations

import argparse

from ..codecs.registry import check_bits
from ..planning.methods import DEFAULT_METHOD, get_method
from ..plotting.report_page import write_report
from ..plotting.results import read_results
from .options import check_output
from .output import counted

NAME = "report"
HELP = "write one HTML page with the pictures, plans and tables of results and profiles"
PARENTS = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument(
        "results", nargs="+", metavar="PROFILE_OR_RESULTS", help="profile, result JSON, or a folder of result JSON"
    )
    parser.add_argument("--output", default="report.html", metavar="FILE", help="the page (default %(default)s)")
    parser.add_argument("--bits", type=float, help="budget of the plan that a profile is shown with (default 3)")


def run(args: argparse.Namespace) -> dict:
    """Write the page; what has no picture is named in it with the reason."""
    check_bits(get_method(DEFAULT_METHOD), args.bits)
    check_output(args.output)
    result = write_report(read_results(args.results, args.bits), args.output)
    if not args.json:
        print(f"Saved {result['output']} ({result['bytes']:,} bytes)")
        if result["skipped"]:
            left = counted(len(result["skipped"]), "picture")
            print(f"Left out: {left}. Its last section says why.")
    return result
