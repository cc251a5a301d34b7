"""`spectralkv generate`: an answer from a compressed cache, beside the plain cache's with `--compare`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from .. import native
from ..arrays.divergence import compare_logits
from ..cache.prompt_cache_file import PromptFile
from ..cache.request import CacheRequest
from ..codecs.registry import check_bits
from ..errors import UsageError
from ..hosts.backends import load_backend
from ..hosts.chat_template import encode_prompt, encode_rest
from ..planning.methods import Method
from ..profile.profile import Profile
from . import tables
from .cache_options import add_cache_options, live_method, open_prompt_file, request_of, with_system_prompt
from .options import (
    check_context,
    check_profile,
    model_options,
    model_path,
    prompt_options,
    prompt_text,
    read_file,
)

NAME, HELP = "generate", "generate text from a compressed cache"
PARENTS = (model_options, prompt_options)
WARM_UP = 32  # tokens run once before anything is timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command alone."""
    add = parser.add_argument
    add("--prompt-cache-file", metavar="FILE", help="go on from a prompt stored by cache-prompt")
    add("--score-file", metavar="FILE", help="text after the prompt to compare the two caches on")
    add("--max-tokens", type=int, default=128, help="tokens to generate (default %(default)s)")
    add("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    add_cache_options(parser)
    add("--compare", action="store_true", help="run the plain cache too and compare bytes, quality and speed")


@dataclass(frozen=True)
class Job:
    """What is settled before the first token is generated.

    stored: the prompt cache file to go on from, or None; method: what the cache is to be, None leaves a stored one as it
    is; prompt: token ids to read, after the stored ones; labels: token ids of `--score-file`; new_cache: makes an empty
    cache, or one with the stored prompt.
    """

    name: str  # of the backend
    backend: ModuleType
    model: Any
    tokenizer: Any
    stored: PromptFile | None
    method: Method | str | None
    prompt: list[int]
    labels: list[int]
    new_cache: Callable

    @property
    def stored_tokens(self) -> int:
        return self.stored.seen if self.stored else 0

    @property
    def label(self) -> str:
        """The method that the cache serves; what is for files only is decoded to use it."""
        used = self.method or (self.stored and self.stored.method)
        return used.name if isinstance(used, Method) and used.live else "plain"


def run(args: argparse.Namespace) -> dict:
    """Generate, compare where that was asked for, and report."""
    job = _prepare(args)
    cache = job.new_cache()  # raises for a wrong budget or profile before anything long runs
    backend, compare = job.backend, args.compare or args.score_file is not None
    native.library()  # what must be built on this machine is built now, before anything is timed
    backend.generate(
        job.model, job.tokenizer, job.prompt[:WARM_UP], backend.plain_cache(job.model), 2, True, lambda token: None
    )
    show = None if args.json else tables.Stream(partial(backend.text_stream, job.tokenizer))
    if show and compare:
        show.title(f"{job.label} cache from the file" if job.stored else f"{job.label} cache")
    result, _ = _generate(job, job.prompt, cache, args, show)
    del cache
    result |= _summary(job, args)
    if compare:
        _compare(job, args, show, result)
    if not args.json:
        tables.print_generation(result)
    return result


def _prepare(args: argparse.Namespace) -> Job:
    """Check all that was given, from what is cheap to check on, and load the model."""
    stored = _open_prompt_file(args) if args.prompt_cache_file else None
    method = live_method(args, stored)
    request = _request(args, stored, method)
    text = prompt_text(args)
    score_text = read_file(args.score_file, "--score-file") if args.score_file else None
    if args.max_tokens < 0 or (args.max_tokens == 0 and score_text is None):
        raise UsageError(f"Expected --max-tokens of at least 1, or 0 with --score-file, received {args.max_tokens}.")
    given = args.profile != "auto" and (stored or (isinstance(method, Method) and method.profile_set))
    loaded = Profile.load(args.profile) if given else None
    if stored:
        loaded = stored.plan(loaded).profile or loaded
    elif loaded is not None:
        check_profile(loaded, request.recipe.profile_set, request.recipe, request.bits)
    name, backend = load_backend(args.backend)
    model, tokenizer = backend.load_model(model_path(args.model), args.dtype)
    if stored:
        prompt = encode_rest(tokenizer, text, stored.metadata.get("raw", True))
    else:
        prompt = encode_prompt(tokenizer, text, args.raw)
    request = with_system_prompt(request, args, tokenizer)
    labels = _labels(args, tokenizer, score_text)
    before = stored.seen if stored else 0
    longest = before + len(prompt) + max(args.max_tokens, len(labels))
    check_context(backend, model, before + len(prompt), longest)

    def new_cache():
        if stored:
            return backend.load_prompt_cache(stored, model, loaded, method=method, bits=args.bits)[0]
        asked = request
        if args.budget_bytes is not None and args.max_context is None:
            asked = replace(request, max_context=longest)
        return backend.build_cache(model, loaded, asked, tokenizer)

    return Job(name, backend, model, tokenizer, stored, method, prompt, labels, new_cache)


def _request(args: argparse.Namespace, stored: PromptFile | None, method: Method | str | None) -> CacheRequest:
    """What the options ask of a new cache, the defaults beside a stored one; raises UsageError for what no model can give.

    `--protect system` and the default of `--max-context` are left to the tokenizer: any length stands for the latter.
    """
    if not isinstance(method, Method):
        if args.bits is not None:
            raise UsageError(f"Expected a method that has {args.bits:g} bits, received {method}. Leave --bits out.")
        return CacheRequest()
    if stored is not None:
        check_bits(method, args.bits, stored.shape)
        return CacheRequest()
    if args.raw and "system" in (args.protect or ()):
        raise UsageError("Expected no --protect system with --raw, which has no system prompt. Name positions: A:B.")
    if args.budget_bytes is not None and args.max_context is None:
        args = argparse.Namespace(**vars(args) | {"max_context": 1})
    return request_of(args, method)


def _labels(args: argparse.Namespace, tokenizer, text: str | None) -> list[int]:
    labels = tokenizer.encode(text, add_special_tokens=False) if text else []
    if text is not None and not labels:
        raise UsageError(f"Expected text to score in --score-file, received none from {args.score_file}.")
    return labels


def _generate(job: Job, prompt: list[int], cache, args: argparse.Namespace, show) -> tuple[dict, list[int]]:
    """Text, bytes and speed of one cache, and the tokens generated."""
    backend = job.backend
    backend.reset_peak()
    if not args.max_tokens:
        return {"text": "", "prompt_tokens": len(prompt), "generated_tokens": 0}, []
    on_token = show.token if show else lambda token: None
    out = backend.generate(job.model, job.tokenizer, prompt, cache, args.max_tokens, args.ignore_eos, on_token)
    if show:
        show.end()
    result = {
        "text": job.tokenizer.decode(out.tokens, skip_special_tokens=True),
        "prompt_tokens": len(prompt),
        "generated_tokens": len(out.tokens),
        **_sizes(backend, cache),
        "peak_bytes": backend.peak_bytes(),
        "prefill_tokens_per_s": out.prefill_tokens_per_s(len(prompt)),
        "decode_tokens_per_s": out.decode_tokens_per_s(),
    }
    return result, out.tokens


def _summary(job: Job, args: argparse.Namespace) -> dict:
    """What was run, and from which file."""
    summary = {
        "prompt_tokens": job.stored_tokens + len(job.prompt),
        "backend": job.name,
        "method": job.label,
    }
    if job.stored:
        summary |= {
            "prompt_cache_file": args.prompt_cache_file,
            "file_method": job.stored.method.name,
            "file_bytes": os.path.getsize(args.prompt_cache_file),
            "cached_tokens": job.stored_tokens,
        }
    return summary


def _compare(job: Job, args: argparse.Namespace, show, result: dict) -> None:
    """Run the plain cache too, and add its figures and the divergence to `result`."""
    backend, model = job.backend, job.model
    whole = [*np.ravel(np.asarray(job.stored.tokens)).tolist(), *job.prompt] if job.stored else job.prompt
    if show and args.max_tokens:
        show.title("plain cache, which reads everything" if job.stored else "plain cache")
    plain, plain_tokens = _generate(job, whole, backend.plain_cache(model), args, show)
    result["dense"] = {**plain, "backend": job.name, "method": "plain"}
    labels = job.labels or plain_tokens
    scored = job.new_cache()
    logits = backend.score(model, job.prompt, labels, scored)
    if not args.max_tokens:
        result |= _sizes(backend, scored)
    del scored
    plain_scored = backend.plain_cache(model)
    reference = backend.score(model, whole, labels, plain_scored)
    if not args.max_tokens:
        result["dense"] |= _sizes(backend, plain_scored)
    result |= compare_logits(reference, logits, labels) | {"scored_tokens": len(labels)}


def _sizes(backend, cache) -> dict:
    size = backend.cache_nbytes(cache)
    return {
        "bits_per_element": size.bits_per_element,
        "cache_bytes": int(size),
        "bytes_by_kind": size.by_kind,
        "exact_tokens": size.exact_tokens,
        "table_bytes": size.table_nbytes,
        "dense_bytes": size.dense_nbytes,
        "compression": size.compression,
    }


def _open_prompt_file(args: argparse.Namespace) -> PromptFile:
    """The file of `--prompt-cache-file`; raises UsageError for options that it leaves no choice in."""
    stored = open_prompt_file(args)
    if args.raw and not stored.metadata.get("raw", True):
        raise UsageError(
            f"Expected no --raw, {args.prompt_cache_file} was made with the chat template. Leave --raw out, or make it with "
            "--raw too."
        )
    if stored.tokens is None and (args.compare or args.score_file):
        raise UsageError(
            f"Expected a prompt cache with its token ids for --compare, {args.prompt_cache_file} has none. Make it with "
            "spectralkv cache-prompt, or give them to save_prompt_cache."
        )
    return stored
