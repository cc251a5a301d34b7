"""Prompt caches in files, and from one method to another; files of both backends are the same."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path

from spectral_kv_core.cache import prompt_cache_file as prompt_file
from spectral_kv_core.cache.layer_cache import LayerCache
from spectral_kv_core.cache.prompt_cache_file import ExactLayer, PromptFile, encode_within
from spectral_kv_core.codecs.registry import make_plan, plan_for
from spectral_kv_core.planning.methods import Method, get_keeping_method, get_live_method
from spectral_kv_core.planning.plan import Plan
from spectral_kv_core.profile.profile import Profile

from . import ops
from .cache import COMPRESSED, SpectralKVCache, fill, layer_contents, put_row, rows_of
from .integration import (
    exact_layer,
    host_layers,
    install,
    model_dtype,
    model_name,
    model_shape,
    padded,
    plain_cache,
    set_exact_layer,
    weights_digest,
)
from .profiler import SpectralProfiler

__all__ = ["decode_cache", "encode_cache", "load_prompt_cache", "save_prompt_cache", "sealed_bits"]


def save_prompt_cache(
    path: str | os.PathLike,
    cache: list,
    tokens: Sequence | None = None,
    *,
    model=None,
    method: str | Method | None = None,
    bits: float | None = None,
    profile: Profile | None = None,
    window: int = 64,
    sinks: int = 4,
    metadata: dict | None = None,
) -> Path:
    """Store a cache that has read a prompt, for `load_prompt_cache` of either backend.

    Args:
        path: Where to write the file, a `.safetensors`.
        cache: A cache of this backend, stored as it is with its prompt ended, or one of the host.
        tokens: Ids [seen] or [B, seen] of what was read, kept in the file.
        model: The model. Its name and the hash of its weights go into the file; needed to encode.
        method: Encodes what the cache holds by this method. None keeps codes as they are, and a host's cache exactly.
        bits: Average stored bits of `method`, as in `make_prompt_cache`.
        profile: The profile for `method`, as in `make_prompt_cache`.
        window: The last tokens, kept exactly by `method`.
        sinks: The first tokens, kept exactly by `method`.
        metadata: JSON that goes along.

    Returns:
        The path.

    Raises:
        UsageError: The cache is empty or of a kind that cannot be stored, `tokens` do not fit it, or arguments do not go
            together.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_mlx import load_model, make_prompt_cache, save_prompt_cache
        >>> model, tokenizer = load_model(demo_model_path())
        >>> cache = make_prompt_cache(model, bits=2)
        >>> import mlx.core as mx
        >>> tokens = tokenizer.encode("The sea is a place of endless wonder.")
        >>> _ = model(mx.array([tokens]), cache=cache)
        >>> save_prompt_cache("build/sea.safetensors", cache, tokens, model=model).name
        'sea.safetensors'
    """
    if method is None and not _stores(cache):
        method = "identity"
    if method is not None:
        if model is None:
            raise ValueError("Expected the model of a cache that is to be encoded, received none. Give model=.")
        method = get_keeping_method(method)
        shape, _, profile = SpectralProfiler().profile_for(model, method, profile)
        plan = plan_for(shape, profile, method, bits, window=window, sinks=sinks)
        cache = encode_cache(plan, cache, sinks, window)
    elif bits is not None:
        raise ValueError(f"Expected a method that has {bits:g} bits, received bits alone. Give method= too.")
    ours = rows_of(cache)
    for layer in ours:
        layer.finalize()
    layers = [layer.store if isinstance(layer, COMPRESSED) else exact_layer(layer) for layer in cache]
    file = PromptFile.of(
        ops,
        ours[0].plan,
        layers,
        tokens=tokens,
        model=model_name(model) if model is not None else "",
        weights_digest=weights_digest(model) if model is not None else "",
        metadata=metadata,
    )
    return file.save(path)


def load_prompt_cache(
    path: str | os.PathLike | PromptFile,
    model,
    profile: Profile | None = None,
    *,
    method: str | Method | None = None,
    bits: float | None = None,
) -> tuple[list, list | None]:
    """Read a stored prompt cache, which goes on where it ended.

    Args:
        path: A file of `save_prompt_cache`, by either backend.
        model: The model that reads on: of the architecture that made the file.
        profile: The profile that the file was made with; None looks for it.
        method: None gives the very cache that was saved, or a plain one where its method is for files only. `plain` gives
            the host's own. Any other encodes the decoded cache again, with the file's window and sinks.
        bits: Average stored bits of `method`, as in `make_prompt_cache`.

    Returns:
        The cache, and the token ids of its prompt, None where the file has none.

    Raises:
        FileNotFoundError: There is no such file.
        UsageError: The file is damaged, of another model or of another profile, or `bits` come without a method.

    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_mlx import load_model, load_prompt_cache, make_prompt_cache, save_prompt_cache
        >>> model, tokenizer = load_model(demo_model_path())
        >>> cache = make_prompt_cache(model, bits=2)
        >>> import mlx.core as mx
        >>> tokens = tokenizer.encode("The sea is a place of endless wonder.")
        >>> _ = model(mx.array([tokens]), cache=cache)
        >>> path = save_prompt_cache("build/sea.safetensors", cache, tokens, model=model)
        >>> cache, read = load_prompt_cache(path, model)
        >>> read == tokens
        True
    """
    file = path if isinstance(path, PromptFile) else PromptFile.load(path)
    plain = method == "plain"
    if bits is not None and (method is None or plain):
        raise ValueError(f"Expected a method that has {bits:g} bits, received {method}.")
    target = None if method is None or plain else get_live_method(get_keeping_method(method))
    file.check(model_shape(model)[0], weights_digest(model))
    plan, dtype = file.plan(profile), model_dtype(model)
    padding = file.padding if any(file.padding) else None
    cache = host_layers(model)
    for layer_idx, host in enumerate(cache):
        if layer_idx not in plan.shape.layers:
            cache[layer_idx] = padded(host, padding) if padding else host
            set_exact_layer(cache[layer_idx], file.exact(ops, layer_idx, dtype))
    for row, layers in enumerate(plan.layer_groups):
        made = SpectralKVCache(plan, row, file.sinks, file.window, padding)
        file.restore(layers[0], made.store, dtype)
        put_row(cache, made)
    if target is not None:
        profile = SpectralProfiler().profile_for(model, target, profile or plan.profile)[2]
        wanted = make_plan(plan.shape, profile, target, bits)
        if wanted.hash != plan.hash:
            cache = encode_cache(wanted, cache, file.sinks, file.window)
    elif plain or not plan.method.live:
        return decode_cache(cache, model), file.tokens
    install(model)
    return cache, file.tokens


def encode_cache(plan: Plan, cache: list, sinks: int, window: int) -> list:
    """What `cache`, plain or compressed, holds, under `plan`.

    A cache of a method for files can be saved and decoded only; its real bits, which depend on the text, stay within those
    of `plan`.
    """
    return encode_within(lambda plan: _encode(plan, cache, sinks, window), _stores, plan)


def sealed_bits(cache: list) -> float:
    """Stored bits per key or value element of the sealed tokens of a compressed cache, 0 where nothing is sealed."""
    return prompt_file.sealed_bits(_stores(cache))


def _encode(plan: Plan, cache: list, sinks: int, window: int) -> list:
    made = list(cache)
    for row, layers in enumerate(plan.layer_groups):
        padding = getattr(cache[layers[0]], "left_padding", None)
        padding = padding if padding is None or isinstance(padding, list) else padding.tolist()
        put_row(made, SpectralKVCache(plan, row, sinks, window, padding))
    fill(made, cache)
    return made


def decode_cache(cache: list, model) -> list:
    """The plain cache of `model` with what `cache` holds, decoded; `cache` stays as it is."""
    plain = plain_cache(model)
    for layer_idx, layer in enumerate(cache):
        if not isinstance(layer, COMPRESSED):
            plain[layer_idx] = copy.deepcopy(layer)
    layers = [layer_idx for layer_idx, layer in enumerate(cache) if isinstance(layer, COMPRESSED)]
    for layer_idx, held in zip(layers, layer_contents(cache, layers)):
        if cache[layer_idx].left_padding:
            plain[layer_idx] = padded(plain[layer_idx], cache[layer_idx].left_padding)
        set_exact_layer(plain[layer_idx], ExactLayer(*held, cache[layer_idx].size()))
    return plain


def _stores(cache: list) -> list[LayerCache]:
    return [layer.store for layer in rows_of(cache)]
