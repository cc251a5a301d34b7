"""Caches for a model, and generation and scoring with them through transformers' own code."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from spectral_kv_core.benchmark.machine import process_peak_bytes
from spectral_kv_core.cache import model_cache
from spectral_kv_core.cache.compressed_layer import leading_layers
from spectral_kv_core.cache.request import CacheRequest
from spectral_kv_core.cache.size import CacheSize
from spectral_kv_core.errors import UsageError
from spectral_kv_core.hosts.protocol import Generated
from spectral_kv_core.hosts.protocol import score as core_score
from spectral_kv_core.planning.budget import SINKS, WINDOW
from spectral_kv_core.planning.methods import DEFAULT_METHOD
from spectral_kv_core.profile.profile import Profile

from . import host
from .cache import SpectralCache
from .capture import attend, recorded
from .detokenizer import text_stream
from .integration import (
    cache_argument,
    device_of,
    load_model,
    max_context,
    model_dtype,
    model_shape,
    plain_cache,
    weights_digest,
)
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
HOST_PACKAGES = ("torch", "transformers")  # whose versions belong to a result


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
) -> SpectralCache:
    """Make an empty compressed cache for `model`, and let the model attend to it.

    Args:
        model: A model of transformers.
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

    Returns:
        The cache, to be passed as `cache`, or as `past_key_values` to transformers before 5.24.

    Raises:
        UsageError: The budget is out of range, arguments do not go together, the profile is of another model, there is
            nothing to compress, or no tokenizer for a calibration.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_torch import load_model, make_prompt_cache
        >>> from spectral_kv_torch.integration import cache_argument
        >>> model, tokenizer = load_model(demo_model_path())
        >>> cache = make_prompt_cache(model, bits=4)
        >>> inputs = tokenizer("The sea is a place", return_tensors="pt")
        >>> output = model.generate(**inputs, **cache_argument(model, cache), max_new_tokens=3, do_sample=False)
        >>> tokenizer.decode(output[0])
        'The sea is a place of endless wonder'
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
    return build_cache(model, profile, request, tokenizer)


def cache_nbytes(cache: Cache) -> CacheSize:
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
        >>> from spectral_kv_torch import cache_nbytes, load_model, make_prompt_cache
        >>> from spectral_kv_torch.integration import cache_argument
        >>> model, tokenizer = load_model(demo_model_path())
        >>> cache = make_prompt_cache(model, bits=2)
        >>> import torch
        >>> tokens = tokenizer.encode("The sea is a place of endless wonder.")
        >>> with torch.no_grad():
        ...     _ = model(torch.tensor([tokens]), **cache_argument(model, cache))
        >>> size = cache_nbytes(cache)
        >>> size.dense_nbytes == len(tokens) * 2 * 30 * 3 * 64 * 2  # layers, KV heads, head_dim, bytes
        True
    """
    return model_cache.cache_nbytes(host, cache)


fill, held_vectors = partial(model_cache.fill, host), partial(model_cache.held_vectors, host)
token_nbytes = partial(model_cache.token_nbytes, host)


class _Clock:
    """A streamer: notes when prefill began and when every token came, and hands tokens on."""

    def __init__(self, on_token: Callable[[int], None]):
        self.on_token, self.tokens, self.times = on_token, [], []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > 1:  # the first call brings the prompt
            token = int(value.reshape(-1)[0])
            self.tokens.append(token)
            self.on_token(token)

    def end(self) -> None:
        pass


@torch.inference_mode()
def generate(
    model,
    tokenizer,
    prompt: list[int],
    cache: Cache,
    max_tokens: int,
    ignore_eos: bool,
    on_token: Callable[[int], None],
) -> Generated:
    """Greedy tokens after `prompt`, which follows what `cache` holds, by `model.generate`, with times.

    `on_token` sees each token as it comes.
    """
    clock = _Clock(on_token)
    config = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=[] if ignore_eos else model.generation_config.eos_token_id,
        pad_token_id=0,
        prefill_chunk_size=PREFILL_CHUNK if len(prompt) > PREFILL_CHUNK else None,
    )
    batch = torch.tensor([prompt], device=device_of(model))
    # transformers takes a mask that is longer than the tokens as a sign that they are new ones only
    mask = torch.ones((1, cache.get_seq_length() + len(prompt)), dtype=torch.long, device=device_of(model))
    given = cache_argument(model, cache)
    model.generate(batch, attention_mask=mask, generation_config=config, streamer=clock, **given)
    return Generated(clock.tokens, clock.times)


@torch.inference_mode()
def feed(model, tokens: list[int], cache: Cache, keep: int = 1) -> np.ndarray:
    """Logits [keep, vocabulary] float32 of the last `keep` (at least 1) of `tokens`, which enter `cache` in one call."""
    batch = torch.tensor([tokens], device=device_of(model))
    given = cache_argument(model, cache)
    return to_numpy(model(batch, use_cache=True, logits_to_keep=keep, **given).logits[0, -keep:])


def prefill(model, prompt: list[int], cache: Cache) -> np.ndarray:
    """Logits [1, vocabulary] float32 of the last token of `prompt`, which enters `cache` in pieces."""
    for start in range(0, len(prompt), PREFILL_CHUNK):
        logits = feed(model, prompt[start : start + PREFILL_CHUNK], cache)
    return logits


@torch.inference_mode()
def read(model, tokens: list[int], cache: Cache) -> None:
    """Let `tokens` enter `cache` in one call; the logits of the last one are made and left."""
    batch = torch.tensor([tokens], device=model.device)
    model(batch, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))


def can_crop(cache: Cache) -> bool:
    """Whether `cache` can forget any number of its last tokens."""
    dropped = any(layer.store is not None and layer.store.has_dropped for layer in leading_layers(cache.layers))
    return not dropped and all(map(_can_crop, cache.layers))


def crop(cache: Cache, tokens: int) -> bool:
    """Let `cache` forget its last `tokens`; False where it cannot, and is of no more use."""
    if not all(map(_can_crop, cache.layers)):
        return False
    try:
        cache.crop(-tokens)
    except UsageError:  # tokens before them were dropped
        return False
    return True


def _can_crop(layer) -> bool:
    """Whether a layer still has what was there before its last tokens came; a full sliding window has not."""
    full = getattr(layer, "is_sliding", False) and layer.get_seq_length() >= layer.sliding_window
    return getattr(layer, "is_croppable", True) and not full


def end_tokens(model, tokenizer) -> set[int]:
    """Tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    known = ends if isinstance(ends, (list, tuple)) else [ends]
    return {token for token in (*known, getattr(tokenizer, "eos_token_id", None)) if token is not None}


score = partial(core_score, prefill, feed)


def reset_peak() -> None:
    """Start a new measurement of peak memory, where the device counts its own."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Peak memory so far: of the card where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return process_peak_bytes()
