"""How a model's layers rotate their keys: found from keys at several positions, with the numbers of the layers' modules."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import CacheList, KVCache

from spectral_kv_core.arrays.rope import Rope
from spectral_kv_core.arrays.rope_fit import SHIFTS, fit_rope

from .host_cache import host_layers
from .ops import to_numpy

TOKENS = 4  # that are rotated, each alone
FAR = (1024, 4096, 16384, 65536)  # positions at which a rotation that changes is looked for
CLOSE = {mx.float32: 2e-3}  # share of a key's length by which a rotation may miss it, by dtype; else as below
CLOSE_HALF = 0.03


def rotations(model, layers: Sequence[nn.Module], context: int | None) -> list[tuple[Rope | None, str]]:
    """How the keys of every entry of the cache of `model` are rotated, and what changes at large positions.

    layers: the decoder layer of every entry. context: tokens that the model was made for. A lone token attends to itself
    at any position, so that nothing but the rotation changes its keys in any layer.
    """
    base = keys_at(model, 0)
    near = {tokens: keys_at(model, tokens) for tokens in SHIFTS}
    far = {tokens: keys_at(model, tokens) for tokens in FAR if context is None or tokens < context}
    found: list[tuple[Rope | None, str]] = []
    for entry, layer in enumerate(layers):
        keys = base.get(entry)
        if keys is None or any(entry not in there for there in (*near.values(), *far.values())):
            found.append((None, ""))
            continue
        close, start = CLOSE.get(keys.dtype, CLOSE_HALF), to_numpy(keys)
        places = {tokens: to_numpy(there[entry]) for tokens, there in (near | far).items()}
        rope, limit = _rotation(start, places, ropes_of(layer, start.shape[-1]), close)
        same = next((other for other, _ in found if rope and other and rope.matches(other)), rope)
        found.append((same, limit))
    return found


def _rotation(
    keys: np.ndarray, places: dict[int, np.ndarray], known: list[Rope], close: float
) -> tuple[Rope | None, str]:
    """The rotation of `keys` up to as large a position of `places` as one explains, and where it changes."""
    shifts = sorted(places)
    for last in range(len(shifts), 1, -1):
        rope, explained = fit_rope(keys, {tokens: places[tokens] for tokens in shifts[:last]}, known, close)
        if explained and last == len(shifts):
            return rope, ""
        if explained:
            return (
                rope,
                f"keys are rotated otherwise somewhere between positions {shifts[last - 1]:,} and {shifts[last]:,}",
            )
    return (known[0], "its rotation was not seen") if known else (None, "")


def keys_at(model, position: int) -> dict[int, mx.array]:
    """By entry of the cache, the keys [TOKENS, H, 1, D] of lone tokens at `position`."""
    cache, found = host_layers(model), {}
    for entry, layer in enumerate(cache):
        for leaf in layer.caches if isinstance(layer, CacheList) else [layer]:
            if hasattr(leaf, "update_and_fetch"):
                _stand_at(leaf, position, found, entry)
    mx.eval(model(mx.arange(3, 3 + TOKENS)[:, None], cache=cache), list(found.values()))
    return found


def _stand_at(leaf, position: int, found: dict[int, mx.array], entry: int) -> None:
    """Let an empty cache say that it is at `position`; it gives back the new tokens and leaves their keys in `found`."""
    given: list[mx.array] = []

    def update_and_fetch(keys, values):
        given[:] = keys, values
        found.setdefault(entry, keys)
        return keys, values

    leaf.offset = position
    if hasattr(leaf, "start_position"):  # of the chunk that it has
        leaf.start_position = position
    leaf.update_and_fetch, leaf.keys_and_values = update_and_fetch, lambda: tuple(given)
    leaf.make_mask = lambda *args, **options: None


def ropes_of(layer: nn.Module, head_dim: int) -> list[Rope]:
    """What the rotary embeddings do that parts of `layer` have."""
    modules = [module for _, module in layer.named_modules()]
    held = [getattr(module, name, None) for module in modules for name in ("rope", "rotary_emb")]
    ropes = (rope_of_module(rope, head_dim) for rope in held if isinstance(rope, nn.Module))
    return [rope for rope in ropes if rope is not None and rope.rotary_dim <= head_dim]


def read_rope(model, head_dim: int) -> Rope | None:
    """Rotary embedding of the full-attention layers, read from the model's own modules alone."""
    layers = [layer for layer, cache in zip(model.layers, host_layers(model)) if type(cache) is KVCache]
    return next((rope for layer in layers or model.layers for rope in ropes_of(layer, head_dim)), None)


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
