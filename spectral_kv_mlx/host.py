"""mlx-lm as the core sees it: `spectral_kv_core.hosts.protocol.Host`."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchRotatingKVCache, KVCache, RotatingKVCache

from spectral_kv_core.cache.decoded_chunks import bytes_per_layer
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
    if not isinstance(layer, RotatingKVCache):
        raise UsageError(
            "Expected windows without left_padding, received both. Generate row by row, or leave windows out."
        )
    return SpectralWindowCache(plan, layer_group, layer.max_size, window)


def layers(cache: list) -> list:
    """The layers of `cache`: the list itself."""
    return cache


def held(layer) -> tuple[list[mx.array], int]:
    """Every array that a layer of the host's own holds, and how many of their elements are in use."""
    if layer.empty():
        return [], 0
    exact = isinstance(layer, (KVCache, RotatingKVCache, BatchRotatingKVCache))
    state = (layer.keys, layer.values) if exact else layer.state
    arrays = [x for _, x in tree_flatten(state) if isinstance(x, mx.array)]
    # those that keep keys and values allocate ahead, in steps of 256 tokens
    return arrays, sum(x[:, :, : layer.size()].size if exact else x.size for x in arrays)


def most_tokens(layer) -> int:
    """How many tokens a layer with a sliding window keeps; 0 for others."""
    return getattr(layer, "max_size", 0)


def buffers(arrays) -> dict[int, int]:
    """Bytes of `arrays`, by array."""
    return {id(x): x.nbytes for x in arrays}
