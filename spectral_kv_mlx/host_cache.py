"""mlx-lm's own cache layers: which ones a model has, and what they hold."""

from __future__ import annotations

import copy

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache

from spectral_kv_core.cache.file_layers import ExactLayer, StateLayer, check_states, in_words
from spectral_kv_core.cache.sliding_window import WindowLayer
from spectral_kv_core.errors import UsageError


def host_layers(model, left_padding: list[int] | None = None) -> list:
    """The cache layers that mlx-lm would use for `model`, whatever `make_cache` the instance was given.

    left_padding: slots before every sequence of a batch; raises UsageError where mlx-lm has no layers for it.
    """
    own = hasattr(type(model), "make_cache")
    layers = type(model).make_cache(model) if own else [KVCache() for _ in model.layers]
    return layers if left_padding is None else [padded(layer, left_padding) for layer in layers]


def padded(cache, left_padding: list[int]):
    """The host's counterpart of `cache` for a batch with left padding; raises UsageError where mlx-lm has none."""
    if type(cache) is KVCache:
        return BatchKVCache(left_padding)
    if type(cache) is RotatingKVCache and not cache.keep:
        return BatchRotatingKVCache(cache.max_size, left_padding)
    if type(cache) is ArraysCache:
        return ArraysCache(len(cache.cache), left_padding)
    raise UsageError(
        f"Expected layers that mlx-lm can pad, received a {type(cache).__name__} with left_padding. Generate row by row."
    )


def plain_cache(model) -> list:
    """The host's own cache, which keeps everything."""
    return host_layers(model)


def cache_of(layers: list) -> list:
    """The host's own cache made of `layers`."""
    return layers


def exact_layer(layer) -> ExactLayer | StateLayer:
    """What a layer of the host's own holds; raises UsageError for a kind that is no list of keys and values, nor states."""
    if isinstance(layer, WindowLayer):
        return ExactLayer(*layer.exact(), layer.seen)
    if type(layer) is ArraysCache:
        return StateLayer("mlx-lm", {str(i): x for i, x in enumerate(layer.cache) if x is not None})
    rotating = type(layer) in (RotatingKVCache, BatchRotatingKVCache)
    if not (rotating or type(layer) in (KVCache, BatchKVCache)) or getattr(layer, "keep", 0):
        raise UsageError(
            f"Expected layers that keep keys and values in their order, or states of linear attention, received a "
            f"{in_words(layer)}, which cannot be stored yet. Keep the prompt itself."
        )
    if layer.empty():
        raise UsageError("Expected a cache that has read a prompt, received an empty one.")
    if not rotating:
        padding = layer.left_padding.tolist() if isinstance(layer, BatchKVCache) else None
        return ExactLayer(*layer.keys_and_values(), layer.size(), padding)
    if isinstance(layer, BatchRotatingKVCache):
        layer = copy.copy(layer)
        layer._temporal_order()
        keys, values, seen = layer.keys[:, :, : layer._idx], layer.values[:, :, : layer._idx], layer._offset
    else:
        keys, values, seen = layer._temporal_order(layer.keys), layer._temporal_order(layer.values), layer.offset
    keep = min(seen, layer.max_size)
    return ExactLayer(keys[:, :, -keep:], values[:, :, -keep:], seen)


def set_exact_layer(layer, held: ExactLayer | StateLayer) -> None:
    """Let an empty layer of the host's own hold the arrays of `held`; raises UsageError when they do not fit it."""
    if isinstance(held, StateLayer):
        check_states(held, "mlx-lm", [str(i) for i in range(len(getattr(layer, "cache", ())))])
        for name, x in held.states.items():
            layer[int(name)] = x
        layer.left_padding = None  # which has been read
        return
    seen, received, window = held.seen, held.keys.shape[2], getattr(layer, "max_size", held.seen + 1)
    if received < min(seen, window - 1):
        raise UsageError(
            f"Expected the last {min(seen, window - 1):,} tokens for a window of {window:,}, received {received:,}: the cache "
            "is of a model with another window. Make it again."
        )
    keep = min(seen, window)
    # torch keeps one token less than the window: the slot of the missing one is the first to be overwritten
    gap = [(0, 0), (0, 0), (max(keep - received, 0), 0), (0, 0)]
    keys, values = (mx.pad(x[:, :, -keep:], gap) for x in (held.keys, held.values))
    kind = type(layer)
    if kind is KVCache:
        layer.state = keys, values, seen
    elif kind is RotatingKVCache:
        layer.state = keys, values, seen, layer.keep, window, keep
    elif kind is BatchKVCache:
        layer.state = keys, values, layer.offset + seen, layer.left_padding, seen
    else:
        padding = layer.left_padding - (seen - keep)
        layer.state = keys, values, layer.offset + seen, padding, window, seen, keep, False
