"""How a model's layers rotate their keys: read from their modules, or measured."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from spectral_kv_core.arrays.rope import Rope

from .host_cache import host_layers
from .ops import to_numpy


def read_rope(model, head_dim: int) -> Rope | None:
    """Rotary embedding of the full-attention layers, read from the model's own modules; measured if of unknown kind."""
    layers = [layer for layer, cache in zip(model.layers, host_layers(model)) if type(cache) is KVCache]
    for layer in layers or model.layers:
        for _, module in layer.named_modules():
            rope = getattr(module, "rope", getattr(module, "rotary_emb", None))
            if isinstance(rope, nn.Module):
                return rope_of_module(rope, head_dim)
    return None


def rope_of_module(rope: nn.Module, head_dim: int) -> Rope | None:
    """What the module `rope` does to heads of `head_dim` channels."""
    if type(rope) is nn.RoPE:
        periods = rope.base ** (np.arange(0, rope.dims, 2) / rope.dims)
        return Rope(tuple(float(w) for w in rope.scale / periods), bool(rope.traditional))
    if hasattr(rope, "_freqs"):
        inv_freq = 1 / to_numpy(rope._freqs).astype(np.float64)
        scaling = float(getattr(rope, "mscale", None) or getattr(rope, "_scale", None) or 1.0)
        return Rope(tuple(float(w) for w in inv_freq), bool(getattr(rope, "traditional", False)), scaling)
    return measure_rope(rope, head_dim)


def measure_rope(rope, head_dim: int) -> Rope | None:
    """What `rope(x, offset=1)` does to the unit vectors of `head_dim` channels; None when it rotates nothing."""
    image = to_numpy(rope(mx.eye(head_dim)[:, None, None], offset=1))[:, 0, 0].astype(np.float64)  # [in, out]
    sine = np.triu(image, 1)  # channel i goes to its partner j > i with scaling * sin(w)
    first, second = np.nonzero(sine)
    if not len(first):
        return None
    angle = np.arctan2(sine[first, second], image[first, first])
    scaling = float(np.median(np.hypot(sine[first, second], image[first, first])))
    interleaved = bool((second == first + 1).all()) and len(first) > 1
    return Rope(tuple(float(w) for w in angle), interleaved, scaling)


def rope_of_layer(layer: nn.Module, head_dim: int) -> Rope | None:
    """Rotary embedding that a part of `layer` has."""
    for _, module in layer.named_modules():
        rope = getattr(module, "rope", getattr(module, "rotary_emb", None))
        if isinstance(rope, nn.Module):
            return rope_of_module(rope, head_dim)
    return None
