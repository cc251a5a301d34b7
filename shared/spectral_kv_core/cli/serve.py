"""`spectralkv serve`: a model behind OpenAI's API, with compressed caches."""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

from ..benchmark.footprint import parse_bytes
from ..hosts.backends import load_backend
from ..serving.sampling import Sampler
from ..serving.settings import Settings
from .cache_options import add_cache_options, profile_of, request_of, with_system_prompt
from .options import add_profile_option, add_sampling_options, model_options, model_path

NAME, HELP = "serve", "serve a model over OpenAI's API, from compressed caches"
PARENTS = (model_options,)
DEFAULTS = Settings  # a field's default is an attribute of its class


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command alone."""
    add = parser.add_argument
    add("--host", default=DEFAULTS.host, help="address to listen at; default %(default)s, this machine alone")
    add("--port", type=int, default=DEFAULTS.port, help="port, 0 for any (default %(default)s)")
    add("--memory-limit", metavar="SIZE", help="bytes that all caches together may take: 512MiB, 2GB (default: none)")
    add(
        "--concurrency",
        type=int,
        default=DEFAULTS.concurrency,
        help="conversations that go on at a time (default %(default)s)",
    )
    add("--stored", type=int, default=DEFAULTS.stored, help="conversations that are kept (default %(default)s)")
    add(
        "--max-tokens",
        type=int,
        default=DEFAULTS.most_tokens,
        help="tokens of an answer for which nobody says (default %(default)s)",
    )
    add_sampling_options(parser, seed=False)
    add_profile_option(parser)
    add_cache_options(parser)


def run(args: argparse.Namespace) -> dict:
    """Serve until Ctrl-C."""
    request = request_of(args)
    Sampler(args.temperature, args.top_p)  # raises for numbers out of range
    path = Path(args.model)
    names = (path.resolve().name, args.model) if path.exists() else (args.model,)  # clients are told no folder
    settings = Settings(
        model=model_path(args.model),
        names=tuple(dict.fromkeys((*names, "default_model"))),
        request_for=partial(with_system_prompt, request, args),
        profile=profile_of(args, request),
        dtype=args.dtype,
        host=args.host,
        port=args.port,
        memory_limit=parse_bytes(args.memory_limit) if args.memory_limit else None,
        most_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        concurrency=args.concurrency,
        stored=args.stored,
    )
    log = logging.getLogger("spectralkv")
    log.setLevel(logging.INFO)
    name, server = load_backend(args.backend, "server")
    server.serve(settings, lambda http: log.info("Serving %s at %s, Ctrl-C ends", args.model, http.url))
    return {"backend": name, "model": args.model}
