"""`spectralkv inspect`: what a profile holds and the plan that a budget gets from it; or what a prompt cache holds."""

from __future__ import annotations

import argparse
import os

from ..cache.prompt_cache_file import FORMAT as PROMPT_FORMAT
from ..cache.prompt_cache_file import PromptFile
from ..codecs.registry import check_bits, make_plan
from ..files.container import format_name
from ..planning.methods import DEFAULT_METHOD, get_method
from ..profile.profile import Profile
from . import tables

NAME, HELP = "inspect", "show a profile and the plan a budget gets from it, or a stored prompt cache"
PARENTS = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command alone."""
    add = parser.add_argument
    add("file", metavar="FILE", help="profile or prompt cache file")
    add("--bits", type=float, help="budget of the plan (default 3)")
    add("--method", default=DEFAULT_METHOD, help="recipe of the plan (default %(default)s)")


def run(args: argparse.Namespace) -> dict:
    """Read the file and show it."""
    method = get_method(args.method)
    check_bits(method, args.bits)
    if format_name(args.file) == PROMPT_FORMAT.name:
        summary = tables.prompt_file_summary(PromptFile.load(args.file))
        if not args.json:
            tables.print_prompt_file(summary)
        return summary
    loaded = Profile.load(args.file)
    plan = make_plan(loaded.shape, loaded, method, args.bits)
    result = {
        "profile": args.file,
        "model": loaded.model,
        "bytes": os.path.getsize(args.file),
        "library_version": loaded.library_version,
        "shape": loaded.shape.to_json(),
        "calibration": loaded.calibration,
        "basis_sets": {name: tables.basis_set_summary(b) for name, b in loaded.basis_sets.items()},
        "plan": tables.plan_summary(plan),
    }
    if not args.json:
        tables.print_profile(loaded)
        tables.print_plan(plan)
    return result
