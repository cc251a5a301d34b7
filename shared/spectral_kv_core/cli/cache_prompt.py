"""`spectralkv cache-prompt`: read a prompt once and store its compressed cache."""

from __future__ import annotations

import argparse
import time

from ..cache.prompt_cache_file import DEFAULT_FILE_METHOD, PromptFile
from ..codecs.registry import check_bits, plan_for
from ..hosts.backends import load_backend
from ..hosts.chat_template import encode_opening, has_template
from ..planning.budget import SINKS, WINDOW, whole_number
from ..planning.methods import get_keeping_method
from ..profile.profile import Profile
from . import tables
from .options import (
    check_context,
    check_output,
    check_profile,
    model_options,
    model_path,
    prompt_options,
    prompt_text,
)

NAME, HELP = "cache-prompt", "read a prompt once and store its compressed cache"
PARENTS = (model_options, prompt_options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command alone."""
    add = parser.add_argument
    add("--method", default=DEFAULT_FILE_METHOD, help="recipe, see: spectralkv methods (default %(default)s)")
    add("--bits", type=float, help="stored bits per sealed element (default: the recipe's)")
    add("--window", type=int, default=WINDOW, help="last tokens kept exactly (default %(default)s)")
    add("--sinks", type=int, default=SINKS, help="first tokens kept exactly (default %(default)s)")
    add("--output", required=True, metavar="FILE", help="where to save")


def run(args: argparse.Namespace) -> dict:
    """Read the prompt, store its cache and report what the file holds.

    The plain cache reads it, so that every token attends exactly; what is stored is encoded at the end.
    """
    check_output(args.output)
    method = get_keeping_method(args.method)
    check_bits(method, args.bits)
    for option in ("window", "sinks"):
        whole_number(option, getattr(args, option), 0)
    text = prompt_text(args)
    loaded = Profile.load(args.profile) if args.profile != "auto" and method.basis_set else None
    if loaded is not None:
        check_profile(loaded, method.basis_set, method, args.bits)
    name, backend = load_backend(args.backend)
    model, tokenizer = backend.load_model(model_path(args.model), args.dtype)
    raw = args.raw or not has_template(tokenizer)
    prompt = encode_opening(tokenizer, text, raw)
    check_context(backend, model, len(prompt), len(prompt) + 1)
    shape, _, found = backend.SpectralProfiler().profile_for(model, method, loaded, tokenizer)
    options = {"window": args.window, "sinks": args.sinks}
    plan_for(shape, found, method, args.bits, **options)  # raises for a wrong budget before anything long runs
    started = time.perf_counter()
    cache = backend.plain_cache(model)
    backend.prefill(model, prompt, cache)
    options |= {"model": model, "method": method, "bits": args.bits, "profile": found, "metadata": {"raw": raw}}
    backend.save_prompt_cache(args.output, cache, prompt, **options)
    seconds = time.perf_counter() - started
    summary = tables.prompt_file_summary(PromptFile.load(args.output))
    if not args.json:
        tables.print_prompt_file(summary)
        print(f"Saved {args.output} after {seconds:.1f} s")
    return summary | {"backend": name, "output": args.output, "seconds": seconds}
