"""The cache of a whole model, whatever the host: made, filled from another, looked into, and weighed."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from numbers import Real

from ..codecs.chunk import join_layers, split_layers
from ..errors import UsageError
from ..hosts.protocol import Host
from ..profile.profile import Profile
from ..profile.stored_profile import stored_profile
from .compressed_layer import CompressedLayer, FollowingLayer, is_compressed, leading_layers
from .held_arrays import numpy_buffers
from .owner import Owner
from .request import CacheRequest
from .size import KINDS, CacheSize, arrays_by_kind, exact_tokens
from .sliding_window import WindowLayer, is_worth_packing


def build_cache(
    host: Host,
    model,
    profile: Profile | None,
    request: CacheRequest,
    tokenizer=None,
    left_padding: list[int] | None = None,
):
    """An empty compressed cache for `model`, which attends to it as codes from now on.

    profile None looks for one, and calibrates (with `tokenizer`) if there is none. left_padding: slots before every
    sequence of a batch, for a host that is told them here. Raises UsageError for a profile of another model, a budget out of
    range, or nothing to compress.
    """
    _check_model(model)
    profile, request = _given_profile(profile, request)
    shape, passed, profile = host.profile_for(model, request.recipe, profile, tokenizer)
    layers = host.models.host_layers(model, left_padding)
    element_bytes = host.xp.zeros((), dtype=host.models.model_dtype(model)).nbytes
    of_token = shape.kv_heads * sum(shape.side_widths) * element_bytes
    other = sum(host.most_tokens(layers[i]) for i in passed if i < len(layers)) * of_token  # some read another's cache
    plan, eviction = request.plan(shape, profile, element_bytes, other)
    if request.windows:
        _pack_windows(host, model, request, tokenizer, layers)
    host.install(model)
    exact = request.sinks, request.window
    cache = host.compressed_cache(plan, layers, *exact, eviction, request.working_set, left_padding)
    name_model(host, model, cache)
    return cache


def name_model(host: Host, model, cache) -> None:
    """Let `cache` know that it is of `model`, to say where that is forgotten."""
    leading_layers(host.layers(cache))[0].belong_to(Owner(host.models, model), host.models.max_context(model))


def _pack_windows(host: Host, model, request: CacheRequest, tokenizer, layers: list) -> None:
    """Let those of the host's `layers` that have a sliding window be codes, where that saves bytes."""
    shape, _, profile = host.profile_for(model, request.window_recipe, None, tokenizer, windows=True)
    plan = request.window_plan(shape, profile)
    for layer_group, (layer_idx,) in enumerate(plan.layer_groups):
        if is_worth_packing(host.most_tokens(layers[layer_idx]), request.window):
            layers[layer_idx] = host.window_layer(plan, layer_group, layers[layer_idx], request.window)


def _check_model(model) -> None:
    """Raise UsageError for what stands in a model's place most easily."""
    name = isinstance(model, (str, os.PathLike))
    if name or model is None or isinstance(model, (Profile, tuple, list, Real)):
        received = f"the name {str(model)!r}" if name else f"a {type(model).__name__}"
        where = repr(str(model)) if name else "NAME"
        raise UsageError(
            f"Expected a model that is loaded, received {received}. Load it: model, tokenizer = load_model({where})."
        )


def _given_profile(profile, request: CacheRequest) -> tuple[Profile | None, CacheRequest]:
    """`profile`, read where it is a path, and `request`, with the bits where they stand in the profile's place.

    Raises UsageError for anything else.
    """
    if isinstance(profile, Real) and not isinstance(profile, bool) and request.bits is None:
        return None, replace(request, bits=float(profile))
    if isinstance(profile, (str, os.PathLike)):
        return stored_profile(profile), request
    if profile is not None and not isinstance(profile, Profile):
        received = repr(profile) if isinstance(profile, Real) else f"a {type(profile).__name__}"
        raise UsageError(
            f"Expected a profile, the path of one, or None, received {received}. Name other arguments: bits=3."
        )
    return profile, request


def fill(host: Host, cache, plain) -> None:
    """Let the empty `cache` take over the tokens of another, as one call with all of them would have left it.

    A single call to an empty cache attends exactly, so only what is stored can differ. `plain`, which may be compressed
    itself, stays as it is. Sequences of a batch must be of equal length in a plain cache of a host that does not know its
    padding.
    """
    layers = host.layers(cache)
    with host.no_gradients():
        for layer_idx, held in enumerate(host.layers(plain)):
            if isinstance(layers[layer_idx], WindowLayer) and not isinstance(held, WindowLayer):
                exact = host.models.exact_layer(held)
                layers[layer_idx].fill(exact.keys, exact.values, exact.seen)
            elif not is_compressed(layers[layer_idx]):
                layers[layer_idx] = host.copy_layer(held)
        compressed = [layer_idx for layer_idx, layer in enumerate(layers) if is_compressed(layer)]
        contents = layer_contents(host, plain, compressed)
        for layer in leading_layers(layers):
            held, paddings = zip(*islice(contents, len(layer.layers)))
            keys, values = join_layers(host.xp, held)
            layer.append(keys, values, paddings[0])
            host.xp.evaluate(*layer.arrays())  # else the keys and values of every layer live until the last one


def layer_contents(host: Host, cache, layers: Sequence[int]) -> Iterator[tuple]:
    """((keys, values) [B, H, seen, D], left padding [B] or None) of every one of `layers`, ascending; codes are decoded.

    Layer groups, which are in `layers` whole, are decoded once.
    """
    held_layers = host.layers(cache)
    for layer in (held_layers[layer_idx] for layer_idx in layers):
        if isinstance(layer, FollowingLayer):
            continue
        if isinstance(layer, CompressedLayer):
            if layer.store is not None:
                layer.store.check_complete()
            keys, values = layer.keys_and_values()
            for held in split_layers(keys, values, len(layer.layers)):
                yield held, layer.store.padding
        else:
            exact = host.models.exact_layer(layer)
            yield (exact.keys, exact.values), exact.padding


def held_vectors(host: Host, cache, layers: Sequence[int]) -> Iterator[tuple]:
    """Of every one of `layers`, ascending: keys and values [H, N, D] float32, NumPy, of the first sequence, and positions.

    Codes are decoded as they are after the prompt. Positions [H or 1, N] are None where every token is held.
    """
    xp, held_layers = host.xp, host.layers(cache)
    same: dict = {}  # what layers share stays shared
    for layer in leading_layers(held_layers):  # heads may keep the same tokens in all layers
        layer.commit()
    for layer in (held_layers[layer_idx] for layer_idx in layers):
        if isinstance(layer, FollowingLayer):
            continue
        if isinstance(layer, CompressedLayer):
            ended = copy.deepcopy(layer, same)
            ended.finalize()
            keys, values = ended.keys_and_values()
            for held in split_layers(keys, values, len(layer.layers)):
                yield *(xp.to_numpy(x[0]) for x in held), ended.store.positions()
        else:
            exact = host.models.exact_layer(layer)
            yield xp.to_numpy(exact.keys[0]), xp.to_numpy(exact.values[0]), None


def cache_nbytes(host: Host, cache) -> CacheSize:
    """Bytes of every array that `cache` holds for its sequences, by kind, passed-through layers of any kind included.

    Beside them stand the bytes of the tables. Caches that code alike share theirs. What layers share counts once.
    """
    by_kind, elements = dict.fromkeys(KINDS, 0), 0
    counted: dict[int, list] = {}
    tables: dict[int, int] = {}
    exact: list[int] = []
    layers = host.layers(cache)
    for layer in leading_layers(layers):  # heads may keep the same tokens in all layers
        layer.commit()
    for layer in layers:
        if isinstance(layer, FollowingLayer):
            continue
        if isinstance(layer, CompressedLayer):
            tables |= host.buffers(layer.tables()) | numpy_buffers(layer.plan)  # some are shared by all layers
            held = arrays_by_kind(layer.store) if layer.store else {}
            used = layer.store.tokens() * layer.kv_heads * sum(layer.plan.shape.side_widths) if layer.store else 0
            exact.append(exact_tokens(layer.store) if layer.store else 0)
        elif isinstance(layer, WindowLayer):
            tables |= host.buffers(layer.tables()) | numpy_buffers(layer.plan)
            held, used = {"sliding window": layer.arrays()}, layer.elements
        else:
            held, used = host.held(layer)
        elements += used
        for kind, arrays in held.items():
            buffers = host.buffers(arrays)
            by_kind[kind] += sum(size for key, size in buffers.items() if key not in counted)
            counted |= dict.fromkeys(buffers, arrays)  # which live until all are counted: keys may be addresses
    mean = sum(exact) / len(exact) if exact else 0.0
    return CacheSize(by_kind, mean, 2 * elements, sum(tables.values()))


def token_nbytes(host: Host, model) -> int:
    """Bytes that a token adds to a cache of `model` at most: those of all layers at the precision of the model.

    A cache has one width for keys and values, whichever is the greater.
    """
    element_bytes = host.xp.zeros((), dtype=host.models.model_dtype(model)).nbytes
    widths = (2 * layer.kv_heads * max(layer.key_dim, layer.value_dim) for layer in host.models.survey(model))
    return max(sum(widths), 1) * element_bytes
