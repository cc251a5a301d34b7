"""`spectralkv methods`: the recipe table."""

from __future__ import annotations

import argparse

from ..planning.methods import METHODS
from . import tables

NAME, HELP = "methods", "list the recipes"
PARENTS = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: the table has no options."""


def run(args: argparse.Namespace) -> dict:
    """Show the table."""
    methods = [
        {
            "name": m.name,
            "summary": m.summary,
            "codec": m.codec,
            "rope": m.rope,
            "group": m.group,
            "time": m.time,
            "block": m.block,
            "needs_profile": m.profile_set is not None,
            "latent_attention": m.latent,
            "drops_tokens": m.scorer is not None,
            "suffers_from_key_means": m.suffers_from_key_means,
            "source": m.source,
        }
        for m in METHODS.values()
    ]
    if not args.json:
        tables.print_methods(methods)
    return {"methods": methods}
