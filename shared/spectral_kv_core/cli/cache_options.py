"""The options of a compressed cache, which every command that makes one has, and the request that they stand for."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import Any

from ..cache.eviction import EVERY
from ..cache.prompt_cache_file import PromptFile
from ..cache.request import CacheRequest
from ..errors import UsageError
from ..hosts.chat_template import system_tokens
from ..planning.budget import SINKS, WINDOW
from ..planning.methods import DEFAULT_METHOD, ROUNDINGS, Method, get_live_method
from ..profile.profile import Profile
from ..scorers.selection import MODES
from ..scorers.waveletkv import WAVELET
from .options import check_profile, spans_of, tiers_of


def add_cache_options(parser: Any) -> None:
    """Add the options to a parser, or to a group of one."""
    add = parser.add_argument
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--bits", type=float, help="stored bits per sealed element (default 3)")
    budget.add_argument("--budget-bytes", type=int, help="bytes that the whole cache may take at --max-context tokens")
    add("--max-context", type=int, help="tokens that --budget-bytes must hold (default: what a single run needs)")
    add("--method", help=f"recipe, see: spectralkv methods (default {DEFAULT_METHOD}, or what a prompt cache file has)")
    add("--window", type=int, help=f"recent tokens kept exactly (default {WINDOW})")
    add("--sinks", type=int, help=f"first tokens kept exactly (default {SINKS})")
    add("--budget-tokens", type=int, help="tokens to keep, sinks and window included, by a method that drops")
    add("--protect", nargs="+", action="extend", metavar="A:B", help="tokens never dropped: positions, or system")
    add(
        "--tiers",
        metavar="SHARE:BITS,...",
        help="bits by rank for SCORER+spectral, such as 0.25:4,0.75:1; drops nothing",
    )
    add(
        "--rounding-scores", choices=ROUNDINGS, help="what weighs tokens when codes are rounded (default: the recipe's)"
    )
    add("--selection", choices=MODES, help=f"who keeps the same tokens (default {MODES[0]})")
    add("--evict-every", type=int, help=f"generated tokens between two rounds of dropping (default {EVERY})")
    add("--wavelet", metavar="NAME", help=f"filters of a wavelet scorer: haar, sym4, bior2.2, ... (default {WAVELET})")
    add(
        "--windows",
        metavar="METHOD",
        help="method that codes layers with a sliding window (default: the host keeps them)",
    )


def given_options(args: argparse.Namespace) -> list[str]:
    """Those options of a cache that were given, as fields of `CacheRequest`."""
    return [field.name for field in fields(CacheRequest) if getattr(args, field.name, None) is not None]


def request_of(args: argparse.Namespace, method: Method | None = None) -> CacheRequest:
    """What the options ask of a new cache of `method`, or of theirs; raises UsageError for what no model can give.

    `--protect system` is left to `with_system_prompt`.
    """
    options = {name: getattr(args, name) for name in given_options(args)}
    options |= {"method": method or get_live_method(args.method or DEFAULT_METHOD), "protect": spans_of(args.protect)}
    if args.tiers is not None:
        options["tiers"] = tiers_of(args.tiers)
    return CacheRequest(**options)


def with_system_prompt(request: CacheRequest, args: argparse.Namespace, tokenizer) -> CacheRequest:
    """`request`, with the tokens of the system prompt protected where `--protect system` was given."""
    if "system" not in (args.protect or ()):
        return request
    return replace(request, protect=(*request.protect, (0, system_tokens(tokenizer))))


def profile_of(args: argparse.Namespace, request: CacheRequest) -> Profile | None:
    """The profile of `--profile`, where `request` reads one; None leaves it to the model."""
    if args.profile == "auto" or not request.recipe.profile_set:
        return None
    profile = Profile.load(args.profile)
    check_profile(profile, request.recipe.profile_set, request.recipe, request.bits)
    return profile


def open_prompt_file(args: argparse.Namespace) -> PromptFile:
    """The file of `--prompt-cache-file`; raises UsageError for options that it leaves no choice in."""
    stored = PromptFile.load(args.prompt_cache_file)
    for option in given_options(args):
        if option not in ("method", "bits"):
            raise UsageError(
                f"Expected no --{option.replace('_', '-')} with --prompt-cache-file, which has its own window and sinks and "
                "takes --method and --bits."
            )
    if len(stored.padding) > 1:
        raise UsageError(f"Expected a prompt cache of one prompt, {args.prompt_cache_file} has {len(stored.padding)}.")
    return stored


def live_method(args: argparse.Namespace, stored: PromptFile | None) -> Method | str | None:
    """What the cache is to be: a recipe, or of a stored one `plain`; None leaves a stored one as it is."""
    if stored is None:
        return get_live_method(args.method or DEFAULT_METHOD)
    if args.method == "plain" or (args.method is None and args.bits is None):
        return args.method
    return get_live_method(args.method or (stored.method if stored.method.live else DEFAULT_METHOD))
