"""Caches for a model, and generation and scoring with them through mlx-lm's own code."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

from spectral_kv_core.benchmark.machine import process_peak_bytes
from spectral_kv_core.cache import model_cache
from spectral_kv_core.cache.model_cache import build_cache
from spectral_kv_core.cache.request import CacheRequest
from spectral_kv_core.cache.size import CacheSize
from spectral_kv_core.hosts.protocol import Generated
from spectral_kv_core.hosts.protocol import score as core_score
from spectral_kv_core.planning.budget import SINKS, WINDOW
from spectral_kv_core.planning.methods import DEFAULT_METHOD
from spectral_kv_core.profile.profile import Profile

from . import host
from .capture import attend, recorded
from .detokenizer import text_stream
from .integration import end_tokens, load_model, max_context, model_dtype, model_shape, plain_cache, weights_digest
from .ops import to_numpy
from .profiler import SpectralProfiler
from .prompt_cache import decode_cache, encode_cache, load_prompt_cache, save_prompt_cache, sealed_bits

__all__ = [  # the names of `spectral_kv_core.hosts.protocol.Generation`, beside those of `host`
    "HOST_PACKAGES", "PREFILL_CHUNK", "SpectralProfiler", "attend", "cache_nbytes", "context_limit", "decode_cache",
    "encode_cache", "feed", "fill", "generate", "held_vectors", "load_model", "load_prompt_cache", "make_prompt_cache",
    "model_dtype", "model_shape", "peak_bytes", "plain_cache", "prefill", "recorded", "reset_peak", "save_prompt_cache",
    "score", "sealed_bits", "text_stream", "weights_digest",
]  # fmt: skip
PREFILL_CHUNK = 2048
context_limit = max_context
HOST_PACKAGES = ("mlx", "mlx-lm")  # whose versions belong to a result


def make_prompt_cache(
    model,
    profile: Profile | None = None,
    bits: float | None = None,
    *,
    budget_bytes: int | None = None,
    max_context: int | None = None,
    method: str = DEFAULT_METHOD,
    window: int = WINDOW,
    sinks: int = SINKS,
    budget_tokens: int | None = None,
    protect: Sequence[tuple[int, int]] = (),
    selection: str | None = None,
    evict_every: int | None = None,
    wavelet: str | None = None,
    tiers: Sequence[tuple[float, float]] | None = None,
    rounding_scores: str | None = None,
    working_set: int = 0,
    tokenizer=None,
    left_padding: list[int] | None = None,
) -> list:
    """An empty compressed cache for `model`, to be passed as `prompt_cache`: one entry per layer, as mlx-lm has it.

    bits: average stored bits per sealed element, a ceiling (default 3); or budget_bytes for max_context tokens.
    window, sinks: last and first tokens kept exactly. profile None looks for one, and calibrates (with `tokenizer`) if
    there is none. A method that drops tokens takes budget_tokens, all that stay stored, or budget_bytes; protect: spans
    (start, end) of positions that stay; selection, evict_every, wavelet: see `Eviction`; tiers: pairs (share, bits) by rank,
    in place of dropping. rounding_scores: the scorer that weighs tokens when codes are rounded, or `nearest`. working_set:
    bytes that decoded chunks may take in all, in 16 bits, for a method that else decodes its history in every step; they are
    bytes of the cache. left_padding: slots of padding before every row of a batch (torch reads them off the
    mask). Raises ValueError for a budget out of range, a profile of another model, or nothing to compress.
    """
    request = CacheRequest(
        method=method,
        bits=bits,
        budget_bytes=budget_bytes,
        max_context=max_context,
        window=window,
        sinks=sinks,
        budget_tokens=budget_tokens,
        protect=protect,
        selection=selection,
        evict_every=evict_every,
        wavelet=wavelet,
        tiers=tiers,
        rounding_scores=rounding_scores,
        working_set=working_set,
    )
    return build_cache(host, model, profile, request, tokenizer, left_padding)


def cache_nbytes(cache: list) -> CacheSize:
    """Bytes of every array that `cache` holds for its sequences, window, sinks and passed-through layers included."""
    return model_cache.cache_nbytes(host, cache)


fill, held_vectors = partial(model_cache.fill, host), partial(model_cache.held_vectors, host)


def generate(
    model,
    tokenizer,
    prompt: list[int],
    cache: list,
    max_tokens: int,
    ignore_eos: bool,
    on_token: Callable[[int], None],
) -> Generated:
    """Greedy tokens after `prompt`, which follows what `cache` holds, by mlx-lm's `generate_step`, with times.

    `on_token` sees each token as it comes.
    """
    ends = () if ignore_eos else end_tokens(tokenizer)
    tokens, times = [], [time.perf_counter()]
    steps = generate_step(
        mx.array(prompt), model, max_tokens=max_tokens, prompt_cache=cache, prefill_step_size=PREFILL_CHUNK
    )
    for token, _ in steps:
        times.append(time.perf_counter())
        tokens.append(token)
        on_token(token)
        if token in ends:
            break
    return Generated(tokens, times)


def feed(model, tokens: list[int], cache: list, keep: int = 1) -> np.ndarray:
    """Logits [keep, vocabulary] float32 of the last `keep` (at least 1) of `tokens`, which enter `cache` in one call.

    mlx-lm's models compute the logits of all of `tokens`, torch only those that are kept.
    """
    logits = to_numpy(model(mx.array([tokens]), cache=cache)[0, -keep:])
    mx.eval([c.state for c in cache])
    return logits


def prefill(model, prompt: list[int], cache: list) -> np.ndarray:
    """Logits [1, vocabulary] float32 of the last token of `prompt`, which enters `cache` in pieces.

    The last token is fed alone, as mlx-lm's `generate_step` does: logits of a whole piece are never made.
    """
    for start in range(0, len(prompt) - 1, PREFILL_CHUNK):
        model(mx.array([prompt[start : min(start + PREFILL_CHUNK, len(prompt) - 1)]]), cache=cache)
        mx.eval([c.state for c in cache])
    return feed(model, prompt[-1:], cache)


score = partial(core_score, prefill, feed)


def reset_peak() -> None:
    """Start a new measurement of peak memory, where the device counts its own."""
    if mx.default_device() != mx.Device(mx.cpu):
        mx.reset_peak_memory()


def peak_bytes() -> int:
    """Peak memory so far: MLX's own count on a GPU, else that of the process."""
    if mx.default_device() != mx.Device(mx.cpu):
        return mx.get_peak_memory()
    return process_peak_bytes()
