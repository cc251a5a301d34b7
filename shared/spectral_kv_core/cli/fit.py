"""`spectralkv fit`: which context fits in memory at which bits; nothing of the weights is read but their sizes."""

from __future__ import annotations

import argparse

from ..benchmark import footprint as fitting
from ..hosts.backends import load_backend
from ..planning.budget import SINKS, WINDOW
from ..planning.methods import DEFAULT_METHOD, get_live_method
from ..profile.profile import Profile
from ..profile.store import find_profile
from . import tables
from .options import model_options, model_path, values_of

NAME, HELP = "fit", "what context fits in memory at which bits, without loading the model"
PARENTS = (model_options,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command alone."""
    add = parser.add_argument
    add("--memory", required=True, metavar="SIZE", help="for weights and cache: 8GB, 8GiB, 512MB or bytes")
    add("--bits", metavar="A,B", help="stored bits per sealed element (default 4,3,2,1)")
    add("--context", metavar="A,B", help="tokens (default: from 4096 on, doubled up to the model's context)")
    add("--method", default=DEFAULT_METHOD, help="recipe, see: spectralkv methods (default %(default)s)")
    add("--window", type=int, default=WINDOW, help="recent tokens kept exactly (%(default)s)")
    add("--sinks", type=int, default=SINKS, help="first tokens kept exactly (%(default)s)")
    add("--profile", default="auto", help="profile file; auto looks for one, and counts a typical one if there is none")


def run(args: argparse.Namespace) -> dict:
    """Count and report."""
    memory = fitting.parse_bytes(args.memory)
    bits, contexts = values_of(args.bits, "--bits", float), values_of(args.context, "--context", int)
    method = get_live_method(args.method)
    wanted = fitting.Wanted(method, bits, contexts, args.window, args.sinks)
    fitting.check_wanted(wanted)
    loaded = Profile.load(args.profile) if args.profile != "auto" and method.basis_set else None
    name, backend = load_backend(args.backend, "footprint")
    model = backend.footprint(model_path(args.model), args.dtype)
    if loaded is not None:
        loaded.check(model.shape)
    elif method.basis_set:
        loaded = find_profile(model.shape, method.basis_set)
    result = {
        "model": args.model,
        "backend": name,
        "method": method.name,
        "memory_bytes": memory,
        "weights_bytes": model.weights_bytes,
        "element_bytes": model.element_bytes,
        "context_limit": model.context,
        "profile": None if loaded is None else loaded.path,
        "passed": {i: reason for i, reason in model.passed.items() if i in model.held},
        "uncounted": {i: reason for i, reason in model.passed.items() if i not in model.held},
        "window": args.window,
        "sinks": args.sinks,
        **fitting.fit(model, memory, wanted, loaded, backend.table_nbytes),
    }
    if not args.json:
        tables.print_fit(result)
    return result
