"""Caches for a model, and generation and scoring with them through mlx-lm's own code."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

from spectral_kv_core.generation import Generated
from spectral_kv_core.methods import get_method
from spectral_kv_core.plan import plan_for
from spectral_kv_core.profile import Profile
from spectral_kv_core.profile_store import auto_profile, name_passed_layers, warn_if_other_weights

from .cache import SpectralKVCache, cache_nbytes
from .integration import (
    end_tokens,
    host_layers,
    install,
    load_model,
    max_context,
    model_dtype,
    model_shape,
    padded,
    weights_digest,
)
from .ops import to_numpy
from .profiler import SpectralProfiler

__all__ = [
    "SpectralProfiler",
    "cache_nbytes",
    "context_limit",
    "generate",
    "load_model",
    "make_prompt_cache",
    "peak_bytes",
    "plain_cache",
    "reset_peak",
    "score",
]
PREFILL_CHUNK = 2048


def make_prompt_cache(
    model,
    profile: Profile | None = None,
    bits: float | None = None,
    *,
    budget_bytes: int | None = None,
    max_context: int | None = None,
    method: str = "spectral",
    window: int = 64,
    sinks: int = 4,
    tokenizer=None,
    left_padding: list[int] | None = None,
) -> list:
    """An empty compressed cache for `model`, to be passed as `prompt_cache`: one entry per layer, as mlx-lm has it.

    bits: average stored bits per sealed element, a ceiling (default 3); or budget_bytes for max_context tokens.
    window, sinks: last and first tokens kept exactly. profile None looks for one, and calibrates (with `tokenizer`) if
    there is none. left_padding: slots of padding before every row of a batch (torch reads them off the mask). Raises
    ValueError for a budget out of range, a profile of another model, or nothing to compress.
    """
    shape, passed = model_shape(model)
    if not shape.layers:
        raise ValueError(
            f"Expected full-attention layers to compress, received only: {', '.join(set(passed.values()))}."
        )
    method = get_method(method)
    if profile is None and method.basis_set:
        profile = auto_profile(shape, method.basis_set, lambda: SpectralProfiler().profile_from_model(model, tokenizer))
    layers = host_layers(model)
    size = model_dtype(model).size
    other = sum(getattr(layers[i], "max_size", 0) for i in passed) * 2 * shape.kv_heads * shape.head_dim * size
    plan = plan_for(shape, profile, method, bits, budget_bytes, max_context, window, sinks, size, other)
    name_passed_layers(passed)
    if profile is not None:
        warn_if_other_weights(profile, weights_digest(model))
    install(model)
    if left_padding is not None:
        for layer_idx in passed:
            layers[layer_idx] = padded(layers[layer_idx], left_padding)
    for row, layer_idx in enumerate(shape.layers):
        layers[layer_idx] = SpectralKVCache(plan, row, sinks, window, left_padding)
    return layers


def plain_cache(model) -> list:
    """The host's own cache, which keeps everything."""
    return host_layers(model)


def generate(
    model,
    tokenizer,
    prompt: list[int],
    cache: list,
    max_tokens: int,
    ignore_eos: bool,
    on_token: Callable[[int], None],
) -> Generated:
    """Greedy tokens after `prompt` by mlx-lm's `generate_step`, with times; `on_token` sees each as it comes."""
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


def score(model, prompt: list[int], continuation: list[int], cache: list) -> np.ndarray:
    """Logits [len(continuation), vocabulary] float32 for every token of `continuation`, fed one at a time after `prompt`.

    The last token of `prompt` is fed alone, as mlx-lm's `generate_step` does: logits of a whole chunk are never made.
    """

    def feed(tokens):
        return model(mx.array([tokens]), cache=cache)[0, -1]

    def settle():
        mx.eval([c.state for c in cache])

    for start in range(0, len(prompt) - 1, PREFILL_CHUNK):
        feed(prompt[start : min(start + PREFILL_CHUNK, len(prompt) - 1)])
        settle()
    logits = []
    for token in [prompt[-1], *continuation[:-1]]:
        logits.append(to_numpy(feed([token])))
        settle()
    return np.stack(logits)


def reset_peak() -> None:
    """Start a new measurement of peak memory, where the device counts its own."""
    if mx.default_device() != mx.Device(mx.cpu):
        mx.reset_peak_memory()


def peak_bytes() -> int:
    """Peak memory so far: MLX's own count on a GPU, else that of the process."""
    if mx.default_device() != mx.Device(mx.cpu):
        return mx.get_peak_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def context_limit(model) -> int | None:
    """Tokens that `model` was made for, None when unknown."""
    return max_context(model)
