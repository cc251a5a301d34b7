"""Caches for a model, and generation and scoring with them through mlx-lm's own code."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from spectral_kv_core.benchmark.machine import process_peak_bytes
from spectral_kv_core.cache import model_cache
from spectral_kv_core.cache.request import CacheRequest
from spectral_kv_core.cache.size import CacheSize
from spectral_kv_core.hosts.protocol import Generated
from spectral_kv_core.hosts.protocol import score as core_score
from spectral_kv_core.planning.budget import SINKS, WINDOW
from spectral_kv_core.planning.methods import DEFAULT_METHOD
from spectral_kv_core.profile.profile import Profile

from . import host, integration
from .capture import attend, recorded
from .detokenizer import text_stream
from .integration import load_model, max_context, model_dtype, model_shape, plain_cache, weights_digest
from .ops import to_numpy
from .profiler import SpectralProfiler
from .prompt_cache import decode_cache, encode_cache, load_prompt_cache, save_prompt_cache, sealed_bits

__all__ = [  # the names of `spectral_kv_core.hosts.protocol.Generation`, beside those of `host`
    "HOST_PACKAGES", "PREFILL_CHUNK", "SpectralProfiler", "attend", "build_cache", "cache_nbytes", "can_crop", "context_limit",
    "crop", "decode_cache", "encode_cache", "end_tokens", "feed", "fill", "generate", "held_vectors", "load_model",
    "load_prompt_cache", "make_prompt_cache", "model_dtype", "model_shape", "peak_bytes", "plain_cache", "prefill",
    "read", "recorded", "reset_peak", "save_prompt_cache", "score", "sealed_bits", "text_stream", "token_nbytes",
    "weights_digest",
]  # fmt: skip
PREFILL_CHUNK = 2048
context_limit = max_context
build_cache = partial(model_cache.build_cache, host)
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
    windows: str | None = None,
    tokenizer=None,
    left_padding: list[int] | None = None,
) -> list:
    """Make an empty compressed cache for `model`, and let the model attend to it.

    Args:
        model: A model of mlx-lm.
        profile: A profile of it, or the path of one. None looks for one, and calibrates if there is none.
        bits: Average stored bits per sealed key or value element, a ceiling. Default: the method's own, 3 for `spectral`.
        budget_bytes: Bytes that the whole cache may take at `max_context` tokens, in place of `bits`.
        max_context: Tokens that `budget_bytes` must hold.
        method: Name of a method with a live cache (`spectralkv methods`), or SCORER+METHOD, which drops tokens.
        window: The last tokens, kept exactly.
        sinks: The first tokens, kept exactly.
        budget_tokens: All tokens that stay stored, for a method that drops some.
        protect: Spans (start, end) of positions that are not dropped.
        selection: `per_layer_per_head`, where every head of every layer keeps tokens of its own, or `per_head`, where a
            head keeps the same tokens in all layers.
        evict_every: Tokens between two evictions while tokens are generated.
        wavelet: Filter of a wavelet scorer, by its name in PyWavelets; the scorer's own unless told.
        tiers: Pairs (share of the tokens, bits), best tokens first, in place of dropping any.
        rounding_scores: Scorer that weighs tokens when codes are rounded, or `nearest`; the method's own unless told.
        working_set: Bytes that decoded chunks may take in all, in 16 bits, for a method that decodes its history in every
            step. They are bytes of the cache.
        windows: Name of the method that codes layers with a sliding window, such as `spectral`, at the same bits. The host
            attends to them decoded. Default: they keep the host's own cache.
        tokenizer: Of the model, for a calibration. Default: the one that the model came with, where it knows from where.
        left_padding: Slots of padding before every sequence of a batch. PyTorch reads them off the mask.

    Returns:
        The cache, to be passed as `prompt_cache`: a list with one entry per layer.

    Raises:
        UsageError: The budget is out of range, arguments do not go together, the profile is of another model, there is
            nothing to compress, or no tokenizer for a calibration.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_mlx import load_model, make_prompt_cache
        >>> model, tokenizer = load_model(demo_model_path())
        >>> cache = make_prompt_cache(model, bits=4)
        >>> import mlx_lm
        >>> mlx_lm.generate(model, tokenizer, "The sea is a place", prompt_cache=cache, max_tokens=3)
        'of endless wonder'
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
        windows=windows,
    )
    return build_cache(model, profile, request, tokenizer, left_padding)


def cache_nbytes(cache: list) -> CacheSize:
    """Count the bytes of every array that `cache` holds for its sequences.

    The window, the sinks and the layers that pass through count too, states of linear attention with them. Tables that
    all sequences share stand apart.

    Args:
        cache: A cache of this backend or of the host.

    Returns:
        The bytes, an int with `dense_nbytes`, what the plain cache needs for the same tokens at 16 bits, with
        `compression`, their ratio, with `bits_per_element`, and with `table_nbytes`. Its `by_kind` tells which bytes are
        codes, exact tokens, sliding windows and states; `exact_tokens` how many tokens are held as they came.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_mlx import cache_nbytes, load_model, make_prompt_cache
        >>> model, tokenizer = load_model(demo_model_path())
        >>> cache = make_prompt_cache(model, bits=2)
        >>> import mlx.core as mx
        >>> tokens = tokenizer.encode("The sea is a place of endless wonder.")
        >>> _ = model(mx.array([tokens]), cache=cache)
        >>> size = cache_nbytes(cache)
        >>> size.dense_nbytes == len(tokens) * 2 * 30 * 3 * 64 * 2  # layers, KV heads, head_dim, bytes
        True
    """
    return model_cache.cache_nbytes(host, cache)


fill, held_vectors = partial(model_cache.fill, host), partial(model_cache.held_vectors, host)
token_nbytes = partial(model_cache.token_nbytes, host)


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
    ends = () if ignore_eos else end_tokens(model, tokenizer)
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


def read(model, tokens: list[int], cache: list) -> None:
    """Let `tokens` enter `cache` in one call that makes no logits."""
    model(mx.array([tokens]), cache=cache)
    mx.eval([c.state for c in cache])


def can_crop(cache: list) -> bool:
    """Whether `cache` can forget any number of its last tokens."""
    return can_trim_prompt_cache(cache)


def crop(cache: list, tokens: int) -> bool:
    """Let `cache` forget its last `tokens`; False where it cannot, and is of no more use."""
    if not can_trim_prompt_cache(cache):
        return False
    trim_prompt_cache(cache, tokens)
    return True


def end_tokens(model, tokenizer) -> set[int]:
    """Tokens that end an answer."""
    return integration.end_tokens(tokenizer)


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
