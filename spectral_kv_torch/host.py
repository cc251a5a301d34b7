"""transformers as the core sees it: `spectral_kv_core.hosts.protocol.Host`."""

from __future__ import annotations

import copy

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from spectral_kv_core.cache.held_arrays import host_arrays
from spectral_kv_core.errors import UsageError

from . import integration, ops
from .cache import SpectralCache, storages
from .kernels.build import prepare
from .profiler import SpectralProfiler
from .window import SpectralWindowLayer

models, xp, buffers, no_gradients = integration, ops, storages, torch.no_grad


def profile_for(model, method, profile=None, tokenizer=None, windows: bool = False) -> tuple:
    """`ProfilerBase.profile_for`; raises UsageError for a module around a model."""
    if not hasattr(model, "config"):
        raise UsageError(
            f"Expected a model of transformers, received a {type(model).__name__}, which has no config. Give the model in it."
        )
    return SpectralProfiler(windows=windows).profile_for(model, method, profile, tokenizer)


def install(model) -> None:
    """`integration.install`, and kernels that are built before anything is timed."""
    integration.install(model)
    prepare(device(model))


def device(model=None) -> torch.device:
    """Where tensors for `model` go; without a model, those for one that is loaded now."""
    if model is not None:
        return integration.device_of(model)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compressed_cache(
    plan, layers: list, sinks: int, window: int, eviction=None, working_set: int = 0, left_padding=None
) -> SpectralCache:
    """A cache of `layers` in which those that `plan` codes are compressed; padding is read off the mask."""
    options = {"eviction": eviction, "working_set": working_set}
    return SpectralCache(plan=plan, layers=layers, sinks=sinks, window=window, **options)


def window_layer(plan, layer_group: int, layer, window: int) -> SpectralWindowLayer:
    """A layer of codes in place of `layer`, a sliding window of the host."""
    return SpectralWindowLayer(plan, layer_group, layer.sliding_window, window)


def layers(cache: Cache) -> list:
    """The layers of `cache`."""
    return cache.layers


def copy_layer(layer):
    """An independent copy of a layer of the host's own."""
    sides = [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None]
    # a sliding window is a view of all that came in, and deepcopy copies what a view keeps alive
    return copy.deepcopy(layer, {id(x): ops.copy(x) for x in sides})


def held(layer) -> tuple[dict[str, list[torch.Tensor]], int]:
    """Every tensor that a layer of the host's own holds, by kind, and how many elements of tokens and states they have."""
    tokens = "sliding window" if getattr(layer, "is_sliding", False) else "exact"
    kinds = {"keys": tokens, "values": tokens, "conv_states": "state", "recurrent_states": "state"}
    found: dict[str, list[torch.Tensor]] = {}
    for _, name, x in host_arrays(layer, torch.Tensor, CacheLayerMixin):
        found.setdefault(kinds.get(name, "other"), []).append(x)
    return found, sum(x.numel() for kind, arrays in found.items() if kind != "other" for x in arrays)


def most_tokens(layer) -> int:
    """How many tokens a layer with a sliding window keeps: one less than its window; 0 for others."""
    return getattr(layer, "sliding_window", 1) - 1
