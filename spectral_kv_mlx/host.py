"""mlx-lm as the core sees it: `spectral_kv_core.hosts.protocol.Host`."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, RotatingKVCache, _BaseCache

from spectral_kv_core.cache.decoded_chunks import bytes_per_layer
from spectral_kv_core.cache.held_arrays import host_arrays
from spectral_kv_core.errors import UsageError

from . import integration, ops
from .cache import SpectralKVCache, put_layer_group
from .profiler import SpectralProfiler
from .window import SpectralWindowCache

models, xp, install, copy_layer = integration, ops, integration.install, copy.deepcopy
no_gradients = nullcontext  # MLX keeps nothing for a backward pass that nobody asked for


def profile_for(model, method, profile=None, tokenizer=None, windows: bool = False) -> tuple:
    """`ProfilerBase.profile_for`."""
    return SpectralProfiler(windows=windows).profile_for(model, method, profile, tokenizer)


def device(model=None) -> None:
    """Memory is unified."""


def compressed_cache(
    plan, layers: list, sinks: int, window: int, eviction=None, working_set: int = 0, left_padding=None
) -> list:
    """A cache of `layers` in which those that `plan` codes are compressed."""
    share = bytes_per_layer(plan, working_set)
    for layer_group in range(len(plan.layer_groups)):
        put_layer_group(layers, SpectralKVCache(plan, layer_group, sinks, window, left_padding, eviction, share))
    return layers


def window_layer(plan, layer_group: int, layer, window: int) -> SpectralWindowCache:
    """A layer of codes in place of `layer`, a sliding window of the host."""
    if not isinstance(layer, RotatingKVCache) or layer.keep:
        raise UsageError(
            "Expected windows without left_padding, received both. Generate row by row, or leave windows out."
        )
    return SpectralWindowCache(plan, layer_group, layer.max_size, window)


def layers(cache: list) -> list:
    """The layers of `cache`: the list itself."""
    return cache


def held(layer) -> tuple[dict[str, list[mx.array]], int]:
    """Every array that a layer of the host's own holds, by kind, and how many elements of tokens and states are in use."""
    found: dict[str, list[mx.array]] = {}
    used = 0
    for owner, name, x in host_arrays(layer, mx.array, _BaseCache):
        kind = _kind(owner, name)
        found.setdefault(kind, []).append(x)
        if kind != "other":
            # those that keep keys and values allocate ahead, in steps of 256 tokens
            knows = name in ("keys", "values") and type(owner).size is not _BaseCache.size
            used += x[:, :, : owner.size()].size if knows else x.size
    return found, used


def _kind(owner, name: str) -> str:
    """What the arrays under the attribute `name` of a cache of mlx-lm are."""
    if isinstance(owner, ArraysCache) and name == "cache":
        return "state"
    if name not in ("keys", "values"):
        return "other"
    return "sliding window" if hasattr(owner, "max_size") or hasattr(owner, "chunk_size") else "exact"


def most_tokens(layer) -> int:
    """How many tokens a layer with a sliding window keeps; 0 for others."""
    return getattr(layer, "max_size", 0)


def buffers(arrays) -> dict[int, int]:
    """Bytes of `arrays`, by array."""
    return {id(x): x.nbytes for x in arrays}
