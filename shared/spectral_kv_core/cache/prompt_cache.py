"""Prompt caches in files, and from one method to another, whatever the host; files of all hosts are the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..codecs.registry import make_plan, plan_for, with_zeros
from ..errors import UsageError
from ..hosts.protocol import Host
from ..planning.budget import SINKS, WINDOW
from ..planning.methods import Method, get_keeping_method, get_live_method
from ..planning.plan import Plan
from ..profile.profile import Profile
from . import prompt_cache_file
from .compressed_layer import is_compressed, leading_layers
from .file_layers import ExactLayer
from .layer_cache import LayerCache
from .model_cache import fill, layer_contents, name_model
from .prompt_cache_file import PromptFile, encode_within
from .sliding_window import WindowLayer


@dataclass(frozen=True)
class Encoding:
    """How a cache is encoded before it is stored. method None: not at all.

    bits: average stored bits of `method`, None for its own. window, sinks: tokens that stay exact.
    """

    method: str | Method | None = None
    bits: float | None = None
    profile: Profile | None = None
    window: int = WINDOW
    sinks: int = SINKS


def save_prompt_cache(
    host: Host,
    path: str | os.PathLike,
    cache,
    tokens: Sequence | None = None,
    *,
    encoding: Encoding,
    model=None,
    metadata: dict | None = None,
) -> Path:
    """`save_prompt_cache` of a backend, where the arguments are described."""
    method, bits = encoding.method, encoding.bits
    if method is None and not leading_layers(host.layers(cache)):
        method = "identity"
    if method is not None:
        if model is None:
            raise UsageError("Expected the model of a cache that is to be encoded, received none. Give model=.")
        method = get_keeping_method(method)
        shape, _, profile = host.profile_for(model, method, encoding.profile)
        plan = plan_for(shape, profile, method, bits, encoding.window, encoding.sinks)
        cache = encode_cache(host, plan, cache, encoding.sinks, encoding.window)
    elif bits is not None:
        raise UsageError(f"Expected a method that has {bits:g} bits, received bits alone. Give method= too.")
    ours = leading_layers(host.layers(cache))
    for layer in ours:
        layer.finalize()
        if layer.store is None or not layer.store.seen:
            raise UsageError("Expected a cache that has read a prompt, received an empty one.")
    file = PromptFile.of(
        host.xp,
        ours[0].plan,
        [layer.store if is_compressed(layer) else host.models.exact_layer(layer) for layer in host.layers(cache)],
        tokens=tokens,
        model=host.models.model_name(model) if model is not None else "",
        weights_digest=host.models.weights_digest(model) if model is not None else "",
        metadata=metadata,
    )
    return file.save(path)


def load_prompt_cache(
    host: Host,
    path: str | os.PathLike | PromptFile,
    model,
    profile: Profile | None = None,
    *,
    method: str | Method | None = None,
    bits: float | None = None,
) -> tuple:
    """`load_prompt_cache` of a backend, where the arguments are described."""
    file = path if isinstance(path, PromptFile) else PromptFile.load(path)
    plain = method == "plain"
    if bits is not None and (method is None or plain):
        raise UsageError(f"Expected a method that has {bits:g} bits, received {method}.")
    target = None if method is None or plain else get_live_method(get_keeping_method(method))
    file.check(host.models.model_shape(model)[0], host.models.weights_digest(model), host.models.model_name(model))
    plan = file.plan(profile)
    cache = _restored(host, file, plan, model)
    if target is not None:
        profile = host.profile_for(model, target, profile or plan.profile)[2]
        wanted = make_plan(plan.shape, profile, target, with_zeros(plan.shape, target, bits))
        if wanted.hash != plan.hash:
            cache = encode_cache(host, wanted, cache, file.sinks, file.window)
    elif plain or not plan.method.live:
        return decode_cache(host, cache, model), file.tokens
    host.install(model)
    return cache, file.tokens


def encode_cache(host: Host, plan: Plan, cache, sinks: int, window: int):
    """What `cache`, plain or compressed, holds, under `plan`.

    A cache of a method for files can be saved and decoded only; its real bits, which depend on the text, stay within those
    of `plan`.
    """

    def encode(plan: Plan):
        made = host.compressed_cache(plan, list(host.layers(cache)), sinks, window)
        fill(host, made, cache)
        return made

    return encode_within(encode, lambda made: _stores(host, made), plan)


def decode_cache(host: Host, cache, model):
    """The plain cache of `model` with what `cache` holds, decoded; `cache` stays as it is."""
    given = host.layers(cache)
    padding = _stores(host, cache)[0].padding
    plain = host.models.host_layers(model, padding if any(padding) else None)
    indices = [layer_idx for layer_idx, layer in enumerate(given) if is_compressed(layer)]
    with host.no_gradients():
        for layer_idx, layer in enumerate(given):
            if isinstance(layer, WindowLayer):
                host.models.set_exact_layer(plain[layer_idx], host.models.exact_layer(layer))
            elif not is_compressed(layer):
                plain[layer_idx] = host.copy_layer(layer)
        for layer_idx, ((keys, values), _) in zip(indices, layer_contents(host, cache, indices)):
            host.models.set_exact_layer(plain[layer_idx], ExactLayer(keys, values, given[layer_idx].store.seen))
    return host.models.cache_of(plain)


def sealed_bits(host: Host, cache) -> float:
    """Stored bits per key or value element of the sealed tokens of a compressed cache, 0 where nothing is sealed."""
    return prompt_cache_file.sealed_bits(_stores(host, cache))


def _restored(host: Host, file: PromptFile, plan: Plan, model):
    """The compressed cache that `file` has."""
    dtype, device = host.models.model_dtype(model), host.device(model)
    padding = file.padding if any(file.padding) else None
    layers = host.models.host_layers(model, padding)
    cache = host.compressed_cache(plan, layers, file.sinks, file.window, left_padding=padding)
    for layer_idx, layer in enumerate(host.layers(cache)):
        if not is_compressed(layer):
            host.models.set_exact_layer(layer, file.exact(host.xp, layer_idx, dtype, device))
    for layer in leading_layers(host.layers(cache)):
        file.restore(layer.layers[0], layer.open(device), dtype, device)
    name_model(host, model, cache)
    return cache


def _stores(host: Host, cache) -> list[LayerCache]:
    return [layer.store for layer in leading_layers(host.layers(cache)) if layer.store is not None]
